"""From a prompt to a video file: pipelines, requests, sampling, mp4."""

"""Pictures of videos and of what attention did; they read records and decide nothing."""

import subprocess
import sys

from PIL import Image
from typer.testing import CliRunner

from nabla_attn.cli import app
from nabla_attn.media import read_video
from nabla_attn.record import RunRecord


def nabla(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_compare_writes_everything(tiny_wan, tmp_path):
    output = tmp_path / "out"
    result = nabla(
        "compare", "--prompt", "a red circle", "--model", tiny_wan, "--output", output,
        "--sparse-algo", "nabla-0.7", "--sparse_algo", "nabla-0.1", "--device", "cpu",
        "--height", 128, "--width", 128, "--frames", 5, "--steps", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.count("nabla-") == 2
    names = ("dense", "nabla-0.7", "nabla-0.1")
    expected = {f"{name}.{kind}" for name in names for kind in ("mp4", "json")}
    assert {path.name for path in output.iterdir()} == expected | {
        "compare.html",
        "contact_sheet.png",
        "side_by_side.mp4",
    }
    assert f"Open {output / 'compare.html'}" in " ".join(result.output.split())
    joined = read_video(output / "side_by_side.mp4")
    assert joined.shape[0] == 5
    assert joined.shape[2] >= 3 * 128
    for name in names:
        assert "ssim" in RunRecord.load(output / f"{name}.json").numbers["to_dense"]
    with Image.open(output / "contact_sheet.png") as sheet:
        assert sheet.width > 1000


def test_help_info_and_version():
    result = nabla("--help")
    assert result.exit_code == 0
    for verb in ("generate", "compare", "info"):
        assert verb in result.stdout
    assert nabla().stdout == result.stdout
    assert nabla("--version").stdout.startswith("nabla-attn ")
    result = nabla("info", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for word in ("torch", "diffusers", "backend gather", "backend flex", "WanTransformer3DModel"):
        assert word in result.stdout


def test_help_does_not_load_the_heavy_libraries():
    code = (
        "import sys; from typer.testing import CliRunner; from nabla_attn.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'diffusers', 'transformers', 'matplotlib', 'av', 'torchmetrics', 'scipy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr

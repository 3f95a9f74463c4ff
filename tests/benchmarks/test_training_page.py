from benchmarks.pages.training import build_page

from nabla_attn.record import RunRecord

RIGHT = {"colour": 1.0, "direction": 0.5, "shape": 0.75, "number": 1.0}


def row(run, algorithm, seed, before, after, **more):
    base = {
        "run": run,
        "algorithm": algorithm,
        "seed": seed,
        "density": 0.1,
        "right": RIGHT,
        "judged": 8,
    }
    return base | {"before": before, "after": after} | more


def write(folder, rows):
    config = {"height": 128, "width": 128, "frames": 61, "steps": 40, "clips": 9, "validation": 2}
    RunRecord("training_study", config, 0, {}, "a device", {"rows": rows}).save(
        folder / "training_study.json"
    )


def test_without_a_record_it_says_how_to_make_one(tmp_path):
    assert "python -m benchmarks.training_study" in build_page(tmp_path)


def test_ratios_and_shares(tmp_path):
    zero = {"zero_shot_right": RIGHT}
    write(
        tmp_path,
        [
            row("pretrain", "dense", 0, 1.0, 0.5),
            row("pretrain", "nabla-0.45", 0, 1.0, 0.51),
            row("pretrain", "dense", 1, 1.0, 0.5),
            row("pretrain", "nabla-0.45", 1, 1.0, 0.49),
            row("distill", "nabla-0.2", 0, 0.4, 0.2, **zero),
            row("lora", "nabla-0.2", 0, 0.4, 0.22, right={}),
        ],
    )
    page = build_page(tmp_path)
    assert "2 seeds; a device" in page and "Judged: 8 held-out prompts, 2 of the seeds." in page
    sparse = next(line for line in page.splitlines() if line.startswith("| nabla-0.45"))
    assert "1.000 (0.980 to 1.020)" in sparse
    student = next(line for line in page.splitlines() if line.startswith("| nabla-0.2 |"))
    assert "| 0.400 | 0.200 | 0.500 | 100% | 50% | 75% |" in student
    lora = next(line for line in page.splitlines() if "LoRA |" in line)
    assert lora.count("–") == 8
    assert "LoRA reaches 0.900 of the full gain." in page


def test_the_shipped_model_has_its_own_section(tmp_path):
    config = {"height": 128, "width": 128, "frames": 61, "steps": 60, "clips": 9, "validation": 2}
    rows = [
        {"run": "teacher", "algorithm": "dense", "seed": 0, "density": 1.0, "right": RIGHT},
        row("distill", "nabla-0.2", 0, 0.4, 0.3, zero_shot_right=RIGHT),
    ]
    for name, steps in (("builtin", 60), ("longer", 300)):
        record = RunRecord(
            "training_study", config | {"steps": steps}, 0, {}, "a device", {"rows": rows}
        )
        record.save(tmp_path / f"distill_{name}.json")
    page = build_page(tmp_path)
    assert page.index("model, 60 steps of") < page.index("model, 300 steps of distillation")
    assert (
        "runs/students --students nabla-0.2 --steps 300 --clips 9 --output distill_longer.json`"
        in page
    )
    assert "(colour 100%, direction 50%, shape 75%, number 100%)" in page
    assert "| nabla-0.2 | 0.100 | 0.400 | 0.300 | 0.250 | 100% | 50% | 75% |" in page


def test_steps_are_compared(tmp_path):
    config = {"tokens": 4096, "rounds": 3}
    times = {"dense": (4.0, 3.0, 5.0), "nabla-0.45": (1.6, 1.5, 1.7)}
    seconds = {
        name: dict(zip(("median", "min", "max"), t, strict=True)) for name, t in times.items()
    }
    numbers = seconds | {"density": {"nabla-0.45": 0.18}}
    RunRecord("training_step", config, 0, {}, "a device", numbers).save(
        tmp_path / "training_step.json"
    )
    page = build_page(tmp_path)
    assert "4,096 tokens" in page and "3 rounds; a device" in page
    assert "| dense | 1.000 | 4.00 (3.00 to 5.00) | 1.00x |" in page
    assert "| nabla-0.45 | 0.180 | 1.60 (1.50 to 1.70) | 2.50x |" in page


def test_adapters_are_told_with_their_thresholds_and_errors(tmp_path):
    config = {
        "lora": {"rank": 4},
        "sparsity": {"algorithm": "nabla-0.5", "thresholds": [0.25, 0.75]},
        "data": {"validation": 3},
    }
    numbers = {"steps": 40, "clips": 9, "seconds": 120.0, "validation": [[0, 0.5], [40, 0.25]]}
    record = RunRecord("train", config, 0, {}, "a device", numbers)
    record.save(tmp_path / "builtin_lora.json")
    page = build_page(tmp_path)
    assert "LoRA of rank 4, 40 steps of distillation on 9 clips in 2 minutes" in page
    assert "from 0.25 to 0.75" in page and "`nabla-0.5` on 3 held-out clips" in page
    assert "| 40 | 0.2500 |" in page
    config["sparsity"]["thresholds"] = None
    RunRecord("train", config, 0, {}, "a device", numbers).save(tmp_path / "builtin_lora.json")
    page = build_page(tmp_path)
    assert "threshold" not in page and "`nabla-0.5` on 3 held-out clips" in page

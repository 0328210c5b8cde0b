"""Made-up runs."""

import pytest

from minigpt4.tracking.metrics import MetricsFile


@pytest.fixture
def make_run():
    """Writes the numbers of a run into a folder. Arguments: the folder, epochs, run.name, further results."""

    def make_run(folder, epochs=2, name="", **more):
        folder.mkdir(parents=True)
        file = MetricsFile(folder / "metrics.jsonl")
        for step in range(1, 50 * epochs + 1):
            values = {"epoch": (step - 1) // 50, "loss": 3 / step, "lr": 1e-4 * step, "host_memory_mib": 900}
            speed = {"images_per_second": 90.0 + step % 5, "step_seconds": 0.1, "data_seconds": 0.01}
            file.write(step, values | speed)
            if step % 50 == 0:
                file.write(step, {"train_loss": 0.5, "val_loss": 10 / step, "left_out/a/no text": 3, **more})
        (folder / "config.yaml").write_text(f"run: {{name: '{name}'}}\n")
        return folder

    return make_run

"""A driver of a user: several trainings in one process, through the functions of `sparsekd`.

Called as `api_driver.py STORE ROOT NAME...`, also by torchrun; the name says what the run is, and further
settings may follow it: `NAME;train.steps=6;objective=kd_ce`.
"""

import logging
import sys

import sparsekd

STUDENT = (
    "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 4, num_key_value_heads: 2}"
)


def settings(store: str, root: str, name: str) -> list[str]:
    return [
        f"store.path={store}", f"run.root={root}", f"run.name={name}", f"student.config={STUDENT}",
        "train.steps=4", "train.global_batch_rows=4", "train.micro_batch_rows=2", "train.log_every=1",
        "train.evaluate_rows=2", "schedule.warmup_steps=2", "engine=zero3_strict", "engine.dtype=float32",
        "tracking=offline", "launch=cpu",
    ]  # fmt: skip


def main() -> int:
    store, root, *names = sys.argv[1:]
    hook = sys.excepthook
    for run in names:
        name, *changes = run.split(";")
        typed = [*settings(store, root, name), *changes]
        config = sparsekd.compose(typed)
        if name == "exploded":
            config.optimizer.learning_rate = 1e30
        if name == "plain":
            config.engine.zero_stage = 1
            config.tracking.wandb = "disabled"
        if name == "mistyped":
            config.train.steps = "many"  # type: ignore[assignment]
        try:
            folder = sparsekd.train(typed if changes else config)
            print(f"\ntrained {folder}", flush=True)
            logging.getLogger("driver").info("after %s", name)
        except sparsekd.UserError as error:
            print(f"\nrefused {name}: {error}", flush=True)
        except SystemExit as left:  # another rank has said why
            print(f"\nleft {name}: {left.code}", flush=True)
        assert sys.excepthook is hook
    return 0


if __name__ == "__main__":
    sparsekd.run_as_process(main)

"""Which GPU a rank takes, where no GPU is needed to say so."""

import pytest

from sparsekd.trainer.distributed import gpu_index
from sparsekd.trainer.errors import UserError


def test_a_rank_takes_its_own_gpu_or_the_only_one_that_slurm_shows_it() -> None:
    assert gpu_index(3, visible=8, under_srun=False) == 3
    assert gpu_index(3, visible=8, under_srun=True) == 3
    assert gpu_index(3, visible=1, under_srun=True) == 0


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="torch sees 2 here; start at most 2 ranks on each"):
        gpu_index(2, visible=2, under_srun=True)
    with pytest.raises(UserError, match="torch sees 1 here"):
        gpu_index(1, visible=1, under_srun=False)

"""Start scripts for torchrun and Slurm, and the mapping from Slurm's variables to torch's."""

"""SLURM jobs: what a config needs of a cluster, planned without one, and the sbatch script that runs it."""

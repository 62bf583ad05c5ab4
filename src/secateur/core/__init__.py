"""The ground floor: torch and the standard library, nothing else."""

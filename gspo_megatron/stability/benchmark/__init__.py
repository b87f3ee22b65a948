"""GSPO against other arms, measured: a file of experiments becomes cells, their results a report. Runs no model: each
cell is a process of its own."""

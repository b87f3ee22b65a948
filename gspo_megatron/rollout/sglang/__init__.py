"""Rollouts from SGLang servers, and the weights on their way to them. SGLang itself is never imported: it is spoken to
over HTTP and in a process group."""

"""Tables, pictures and the self-contained HTML report of a run."""

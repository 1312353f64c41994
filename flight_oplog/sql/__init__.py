"""SQL over a snapshot: what a statement is, what it may name, how it runs, and how it is carried out."""

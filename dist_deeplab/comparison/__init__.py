"""Several runs side by side: what they are, what they reached and what they cost; tables and a figure of it."""

"""A ladder: a family of runs that differ in a few values, priced, launched and watched as one, with a scaling law at its end."""

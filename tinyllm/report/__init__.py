"""Whether a run worked: evidence, a verdict drawn from it, and the pages that show both."""

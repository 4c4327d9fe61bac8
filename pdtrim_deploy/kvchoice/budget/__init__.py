"""Selection by measured harm: effects of every option, a quadratic solver, and new measurements around its result."""

"""Selection by measured harm: effects of every option, a quadratic solver, and measuring again about what it found."""

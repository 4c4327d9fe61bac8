"""What an SGLang worker is told beside SGLang's own options. Pure: no torch."""

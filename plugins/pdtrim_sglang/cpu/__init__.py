"""What SGLang 0.5.23 does on GPUs, and on CPUs with Intel AMX alone, on any CPU: slowly, for tests and trials."""

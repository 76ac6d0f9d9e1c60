"""The seams, the numbers and the machine: everything that knows no concrete model, objective or adapter."""

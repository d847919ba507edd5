"""What tests, benchmarks and the doctor share: a literal float64 oracle, inputs, and the checks of the contract."""

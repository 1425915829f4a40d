"""What benchmarks/zero.py is made of; the ranks of the peers import it without Powertrain."""

"""Plans, the solvers and passes that write them, and the executors that run them."""

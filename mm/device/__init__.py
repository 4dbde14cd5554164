"""The only room that names cuda, npu or cpu: the backend, memory statistics, and the kernels the model is made of."""

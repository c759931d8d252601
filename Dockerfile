# The package and JAX for one kind of device; models are mounted. `--build-arg EXTRA=cuda` for GPUs, EXTRA=tpu is the default.
FROM python:3.12-slim
ARG EXTRA=tpu
WORKDIR /kimi-jax
COPY pyproject.toml README.md LICENSE ./
COPY checkpoints checkpoints
COPY kimi_jax kimi_jax
COPY pallas_kernels pallas_kernels
COPY sharding sharding
RUN pip install --no-cache-dir ".[${EXTRA},serve]" && rm -rf /kimi-jax
WORKDIR /models
ENTRYPOINT ["kimi-jax"]

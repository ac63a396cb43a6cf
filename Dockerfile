# SPDX-License-Identifier: Apache-2.0
# The image that GKE runs: slowfast with the TPU libraries, at the versions of launch/constraints.txt.
#   docker build -t REGION-docker.pkg.dev/PROJECT/images/slowfast-jax:0.1.0 .

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY slowfast_jax slowfast_jax
COPY configs configs
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# As root: the TPU's device nodes belong to it.
FROM python:3.11-slim-bookworm
COPY --from=wheel /wheels /wheels
COPY launch/constraints.txt /wheels/constraints.txt
RUN pip install --no-cache-dir --constraint /wheels/constraints.txt "$(ls /wheels/*.whl)[tpu]" \
  && rm -r /wheels
WORKDIR /work
CMD ["slowfast", "doctor"]

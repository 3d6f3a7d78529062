# One image for NVIDIA GPUs. The wheels bring CUDA's libraries; of the machine it needs the driver and NVIDIA's container
# toolkit.
#   docker build -t jaxdistill .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" jaxdistill train --config configs/quickstart.yaml
# /work is where models, data, configs and runs are. CUDA 13: --build-arg EXTRA=cuda13. The teacher's server is another
# image, SGLang's own.
FROM python:3.12-slim-bookworm AS build
ARG EXTRA=cuda12
WORKDIR /src
RUN python -m venv /opt/jaxdistill
# What changes seldom first: the libraries are gigabytes, and are not installed again for a change of the code.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir jaxdistill && touch jaxdistill/__init__.py \
    && /opt/jaxdistill/bin/pip install --no-cache-dir --no-compile -c constraints.txt ".[${EXTRA}]" \
    && /opt/jaxdistill/bin/pip uninstall --yes jaxdistill
COPY jaxdistill jaxdistill
RUN /opt/jaxdistill/bin/pip install --no-cache-dir --no-deps .

FROM python:3.12-slim-bookworm
COPY --from=build /opt/jaxdistill /opt/jaxdistill
# Nothing here needs root; files of a run belong to whoever --user names.
RUN useradd --create-home --uid 1000 jaxdistill
USER 1000
ENV PATH=/opt/jaxdistill/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["jaxdistill"]
CMD ["--help"]

# docker build -f helm/images/cpu.Dockerfile -t astra-serve-cpu:0.1.0 .
# The tests do not build this image, because they have no container engine. They lint it, and `make` installs the same
# lock, which includes the packages of the tests.
FROM python:3.11-slim-bookworm

# g++ compiles the LoRA kernel at its first use, and the model of vLLM.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --home-dir /home/astra astra

WORKDIR /opt/astra
COPY requirements-cpu.lock ./
RUN sed -n 's/^# \(torch==\)/\1/p' requirements-cpu.lock > torch.txt \
    && pip install --no-cache-dir --no-deps --index-url https://download.pytorch.org/whl/cpu --requirement torch.txt \
    && pip install --no-cache-dir --no-deps --require-hashes --requirement requirements-cpu.lock
COPY pyproject.toml README.md LICENSE ./
COPY astra_serve astra_serve
COPY converter converter
COPY trainer trainer
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && python3 -c "import redis, s3fs, astra_serve.start"

USER 1000:1000
ENV HOME=/home/astra
WORKDIR /home/astra
EXPOSE 8000
ENTRYPOINT ["astra-serve"]

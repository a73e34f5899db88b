# docker build -f helm/images/gpu.Dockerfile -t astra-serve:0.1.0 .
# The tests do not build this image, because they have no container engine. They lint it.
FROM vllm/vllm-openai:v0.32.0

# Packages of the server; the constraints keep the versions that the image has for vLLM.
WORKDIR /opt/astra
COPY pyproject.toml README.md LICENSE ./
COPY astra_serve astra_serve
COPY converter converter
COPY trainer trainer
RUN python3 -m pip freeze --exclude-editable > /tmp/installed.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/installed.txt '.[s3,redis]' \
    && rm /tmp/installed.txt \
    && python3 -c "import redis, s3fs, astra_serve.start" \
    && useradd --uid 1000 --create-home --home-dir /home/astra astra

USER 1000:1000
ENV HOME=/home/astra
WORKDIR /home/astra
EXPOSE 8000
ENTRYPOINT ["astra-serve"]

# An image that is `ampd`: docker run --read-only -e AMP_CONFIG_METADATA_DB__URL image migrate
# It runs as no particular user, writes nothing to its root, and every module in it is compiled.
FROM python:3.13-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY ampd ampd
RUN python -m venv /opt/ampd \
    && /opt/ampd/bin/pip install --no-cache-dir --no-compile . \
    && /opt/ampd/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/ampd/lib

FROM python:3.13-slim
COPY --from=build /opt/ampd /opt/ampd
ENV PATH=/opt/ampd/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["ampd"]
CMD ["--help"]

# Server and kernels in one image: `docker build --tag tokenspeed .` (no GPU needed), docs/install.md shows how to run it.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/tokenspeed
ENV PATH=/opt/tokenspeed/bin:$PATH
RUN pip install --no-cache-dir torch==2.13.0 setuptools==84.2.1 pybind11==3.1.0 ninja==1.13.2
COPY . /source
RUN TOKENSPEED_CUDA=1 pip install --no-cache-dir --no-build-isolation '/source[server]'

FROM nvidia/cuda:13.0.1-base-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home tokenspeed && mkdir /models && chown tokenspeed /models
COPY --from=build /opt/tokenspeed /opt/tokenspeed
ENV PATH=/opt/tokenspeed/bin:$PATH HF_HOME=/models
USER tokenspeed
VOLUME /models
EXPOSE 8000
ENTRYPOINT ["tokenspeed"]
CMD ["info"]

# ChunkKV-TRT in a Triton container that carries TensorRT-LLM 1.2.1 with its engine backend; later ones do so too.
#   docker build -f docker/tensorrt-llm.Dockerfile -t chunkkv-trtllm .
# This recipe has not been run: neither the containers nor a GPU were at hand. Tried outside of them: CMake's configuration
# with these targets, and that this backend imports without onnx and onnxruntime.
# With a TensorRT-LLM that gives blocks back (docs/tensorrt-llm.md, "Blocks back under the C++ runtime"):
#   docker build -f docker/tensorrt-llm.Dockerfile --target patched-source --build-context tensorrt_llm=TensorRT-LLM \
#       --output patched .
# writes the changed files of that checkout to patched/. Build the checkout with them as its own documentation says, put
# the new libtensorrt_llm.so into a folder, and give that folder and the build argument:
#   docker build -f docker/tensorrt-llm.Dockerfile --build-arg TENSORRT_LLM=patched \
#       --build-context tensorrt_llm_libraries=FOLDER -t chunkkv-trtllm .
ARG TENSORRT_LLM=stock
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.04-trtllm-python-py3

FROM ${CUDA_IMAGE} AS plugins
RUN apt-get update && apt-get install -y --no-install-recommends cmake g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY CMakeLists.txt ./
COPY plugins plugins
# sm_80 to sm_120. The plugin interface is declared in plugins/tensorrt/abi, so no TensorRT headers are needed.
RUN cmake -S . -B build -DCHUNKKV_RELEASE=ON && cmake --build build --parallel \
    --target chunkkv chunkkv_tensorrt10 chunkkv_tensorrt_loader

# Empty unless --build-context gives folders of these names.
FROM scratch AS tensorrt_llm
FROM scratch AS tensorrt_llm_libraries

FROM python:3.12-slim AS patcher
COPY docker/tensorrt_llm_patch /patch
RUN --mount=from=tensorrt_llm,target=/tree \
    python /patch/apply.py /tree --out /changed

FROM scratch AS patched-source
COPY --from=patcher /changed /

FROM ${TRITON_IMAGE} AS stock

FROM ${TRITON_IMAGE} AS patched
RUN --mount=from=tensorrt_llm_libraries,target=/libraries \
    installed=$(find / -xdev -name libtensorrt_llm.so -not -path '/libraries/*') && test -n "$installed" \
    && for library in $installed; do cp /libraries/libtensorrt_llm.so "$library"; done

FROM ${TENSORRT_LLM}
COPY --from=plugins /src/build/libchunkkv.so /src/build/libchunkkv.architectures /src/build/libchunkkv_tensorrt.so.10 \
    /src/build/libchunkkv_tensorrt_loader.so /opt/chunkkv/lib/
ENV CHUNKKV_LIB=/opt/chunkkv/lib/libchunkkv.so
WORKDIR /opt/chunkkv/src
COPY pyproject.toml README.md LICENSE ./
COPY builder builder
COPY python python
# Without dependencies, so that nothing TensorRT-LLM pinned is moved; onnx and onnxruntime serve the other backends.
RUN pip install --no-cache-dir --no-deps . && pip install --no-cache-dir --upgrade-strategy only-if-needed \
    "ml_dtypes>=0.5,<1" "tokenizers>=0.20,<1" "jinja2>=3.1.6,<4" "rich>=13,<16" \
    "cuda-bindings>=12.9,<14"
# The loader is preloaded by the process that serves (see docs/tensorrt-llm.md), not here: a build loads the plugins itself.

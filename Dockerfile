# The image of every node of a KubeRay cluster: Ray, expertmesh and the exact versions the tests pass with.
#
#   docker build -t expertmesh:0.1.0 .                                 CPU nodes, and a first try anywhere
#   docker build -t expertmesh:0.1.0-gpu --build-arg VARIANT=-gpu --build-arg TORCH_INDEX= .
#   docker build -t expertmesh:0.1.0-demo --build-arg DEMO_MODEL=examples/demo_model .
ARG RAY_VERSION=2.60.0
# "" and "-gpu" are tags of the official image; -gpu brings CUDA for the NVIDIA container runtime.
ARG VARIANT=""
FROM rayproject/ray:${RAY_VERSION}-py311${VARIANT}

# Where torch comes from. Empty: the package index, whose Linux wheels are built for CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# Made by the image's user, so that the user may write there; WORKDIR alone would make it root's.
RUN mkdir -p /home/ray/expertmesh
WORKDIR /home/ray/expertmesh

# Dependencies first: they change seldom, and this layer is the large one.
COPY --chown=ray:users constraints.txt pyproject.toml LICENSE README.md ./
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} "$(grep '^torch==' constraints.txt)" \
    && python -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]))' \
       > dependencies.txt \
    && pip install --no-cache-dir -c constraints.txt -r dependencies.txt

COPY --chown=ray:users protos/ protos/
COPY --chown=ray:users experts/ experts/
COPY --chown=ray:users router/ router/
COPY --chown=ray:users cluster/ cluster/
RUN pip install --no-cache-dir --no-deps . \
    && python -c 'import cluster.app; cluster.app.build' \
    && expertmesh --help > /dev/null

# A model to try the image with. The default copies a file of a few bytes: real models come from a volume.
ARG DEMO_MODEL=LICENSE
COPY --chown=ray:users ${DEMO_MODEL} /home/ray/model/

# Worker processes of Ray start with these modules loaded: a new replica serves in under a second.
ENV RAY_preload_python_modules=torch,ray.serve._private.replica \
    HF_HUB_OFFLINE=1

# The base image's own user; KubeRay overrides the command with `ray start`.
USER ray

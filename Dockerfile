# The image of the agent, both its processes and the plugin: two static programs, and nft with the
# libraries that it needs. Two ways to the same image:
#   docker build --build-arg VERSION=0.1.0 -t skein:0.1.0 .
#   .ci/image-root PROGRAMS dist/ && docker build --target from-binaries … (nothing is pulled or compiled)
# The first needs BuildKit, which leaves out the stages that are not asked for.

# The image that compiles. A release pins it by its digest (.github/workflows/release.yml):
#   --build-arg BUILD_IMAGE=rust:1.95-trixie@sha256:…
# Debian 13 has nft 1.1.3: versions up to 1.1.1 crash on sets that later versions have written on the node.
ARG BUILD_IMAGE=rust:1.95-trixie

FROM scratch AS base
ARG VERSION=0.0.0
LABEL org.opencontainers.image.title="Skein" \
      org.opencontainers.image.description="Encrypted, batched container network for Kubernetes" \
      org.opencontainers.image.source="https://github.com/skein-network/skein" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
ENV PATH=/usr/sbin:/usr/bin
ENTRYPOINT ["/usr/bin/skein-agent"]

FROM base AS from-binaries
COPY dist/ /

FROM ${BUILD_IMAGE} AS build
RUN apt-get update && apt-get install --yes --no-install-recommends nftables
WORKDIR /source
COPY . .
RUN target="$(uname -m)-unknown-linux-gnu" \
    && RUSTFLAGS="-C target-feature=+crt-static" cargo build --locked --profile dist --target "$target" \
       --package skein-agent --package skein-cni --bins \
    && .ci/image-root "target/$target/dist" /root-of-image

FROM base
COPY --from=build /root-of-image/ /

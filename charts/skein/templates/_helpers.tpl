{{/* Labels of every object. */}}
{{- define "skein.labels" -}}
app.kubernetes.io/name: skein
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Selector of the agents' pods. It never changes, because a DaemonSet's selector cannot be changed. */}}
{{- define "skein.selector" -}}
app.kubernetes.io/name: skein
app.kubernetes.io/component: agent
{{- end }}

{{/* Labels and annotations of an object with further labels of its own. */}}
{{- define "skein.metadata" -}}
{{- $root := index . 0 -}}
labels:
  {{- include "skein.labels" $root | nindent 2 }}
  {{- with index . 1 }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $root.Values.annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "skein.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end }}

{{/* A value as TOML on one line. Helm stores every number as a float; integers are written as integers. */}}
{{- define "skein.toml" -}}
{{- if kindIs "map" . -}}
{ {{- $map := . }}{{ $comma := "" }}
{{- range $key := keys . | sortAlpha }}
{{- $value := index $map $key }}
{{- if not (kindIs "invalid" $value) }}{{ $comma }} {{ $key | toJson }} = {{ include "skein.toml" $value }}{{ $comma = "," }}{{ end }}
{{- end }} }
{{- else if kindIs "slice" . -}}
[{{ range $index, $value := . }}{{ if $index }}, {{ end }}{{ include "skein.toml" $value }}{{ end }}]
{{- else if and (kindIs "float64" .) (eq (floor .) .) -}}
{{ int64 . }}
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end }}

{{/* An address as it is written before a port: IPv6 in brackets. */}}
{{- define "skein.host" -}}
{{ if contains ":" . }}[{{ . }}]{{ else }}{{ . }}{{ end }}
{{- end }}

{{/* Refuses a prefix (name of the value, text) with host bits, and names the prefix to write. Renders
nothing. The schema has checked the syntax. */}}
{{- define "skein.checkHostBits" -}}
{{- $name := index . 0 }}{{ $cidr := index . 1 }}
{{- $address := index (splitList "/" $cidr) 0 }}{{ $length := index (splitList "/" $cidr) 1 | int }}
{{- $groups := list }}{{ $width := 8 }}{{ $verb := "%d" }}{{ $separator := "." }}
{{- if contains ":" $address }}
{{- $width = 16 }}{{ $verb = "%x" }}{{ $separator = ":" }}
{{- $halves := splitList "::" (lower $address) }}
{{- $texts := compact (splitList ":" (index $halves 0)) }}
{{- if gt (len $halves) 1 }}
{{- $last := compact (splitList ":" (index $halves 1)) }}
{{- range until (sub 8 (add (len $texts) (len $last)) | int) }}{{ $texts = append $texts "0" }}{{ end }}
{{- $texts = concat $texts $last }}
{{- end }}
{{- range $texts }}
{{- $group := 0 }}
{{- range splitList "" . }}
{{- /* A digit's value is the number of digits before it. */}}
{{- $group = add (mul $group 16) (len (index (splitList . "0123456789abcdef") 0)) }}
{{- end }}
{{- $groups = append $groups $group }}
{{- end }}
{{- else }}
{{- range splitList "." $address }}{{ $groups = append $groups (int64 .) }}{{ end }}
{{- end }}
{{- $network := list }}
{{- range $index, $group := $groups }}
{{- $size := 1 }}
{{- range until (min $width (max 0 (sub (mul $width (add $index 1)) $length)) | int) }}{{ $size = mul $size 2 }}{{ end }}
{{- $network = append $network (printf $verb (sub $group (mod $group $size))) }}
{{- if mod $group $size }}{{ $address = "" }}{{ end }}
{{- end }}
{{- if not $address }}
{{- $right := regexReplaceAll "(:0){2,}$" (join $separator $network) "::" }}
{{- fail (printf "%s=%s has host bits set: write %s/%d" $name $cidr $right $length) }}
{{- end }}
{{- end }}

{{/* Refuses a prefix (name of the value, text) that pods cannot have. Renders nothing. */}}
{{- define "skein.checkPodCidr" -}}
{{- $name := index . 0 }}{{ $cidr := index . 1 }}
{{- if regexMatch "^(127|22[4-9]|23[0-9])[.]|^169[.]254[.]|^::1/|^[fF][fF]..:|^[fF][eE][89abAB].:" $cidr }}
{{- fail (printf "%s=%s cannot hold pods: use a unicast prefix that is neither loopback nor link-local" $name $cidr) }}
{{- end }}
{{- include "skein.checkHostBits" . }}
{{- end }}

{{/* agent.toml. During an upgrade, agents of the earlier release read the same file, and refuse keys
that they do not know: a key that is newer than the first release is written only if its value differs
from the agent's default. */}}
{{- define "skein.config" -}}
{{- with .Values.podCidr }}{{ include "skein.checkPodCidr" (list "podCidr" .) }}{{ end }}
{{- with .Values.podCidrv6 }}{{ include "skein.checkPodCidr" (list "podCidrv6" .) }}{{ end }}
{{- range $index, $cidr := .Values.cni.noMasquerade }}
{{- include "skein.checkHostBits" (list (printf "cni.noMasquerade[%d]" $index) $cidr) }}
{{- end -}}
cluster_id = {{ .Values.clusterId | toJson }}
cluster_cidrs = {{ include "skein.toml" (compact (list .Values.podCidr .Values.podCidrv6)) }}

[key_rotation]
{{- with .Values.keyRotation }}
every_days = {{ int .everyDays }}
settle_seconds = {{ int .settleSeconds }}
{{- end }}

[kubernetes]
enabled = true
{{- with .Values.endpointInterface }}
endpoint_interface = {{ toJson . }}
{{- end }}
{{- with .Values.notReadyTaint }}
not_ready_taint = {{ toJson . }}
{{- end }}
{{- with .Values.mtu }}

[interface]
mtu = {{ int . }}
{{- end }}

[underlay]
port = {{ int .Values.port }}

[dataplane]
mode = "external"
socket = "/run/skein/dataplane.sock"
{{- with .Values.lanes }}
lanes = {{ int . }}
{{- end }}
cipher = {{ .Values.encryption.cipher | toJson }}
bundling = {{ .Values.bundling }}
{{- if .Values.requireConfinement }}
require_confinement = true
{{- end }}
{{- if not (kindIs "invalid" .Values.busyPollMicroseconds) }}
busy_poll_us = {{ int .Values.busyPollMicroseconds }}
{{- end }}

[offload]
{{- with .Values.offload }}
tun_uso = {{ .tunUso }}
tun_tso = {{ .tunTso }}
tun_checksum = {{ .tunChecksum }}
udp_gso = {{ .udpGso }}
udp_gro = {{ .udpGro }}
{{- if and (hasKey . "udpEcn") (not .udpEcn) }}
udp_ecn = false
{{- end }}
{{- end }}

[metrics]
{{- with .Values.metrics }}
listen = {{ printf "%s:%d" (include "skein.host" .address) (int .port) | toJson }}
per_peer = {{ .perPeer }}
{{- with .hosts }}
hosts = {{ include "skein.toml" . }}
{{- end }}
{{- end }}
{{- with .Values.statusPage }}
{{- if .enabled }}

[status_page]
listen = {{ printf "%s:%d" (include "skein.host" .address) (int .port) | toJson }}
{{- end }}
{{- end }}

[cni]
enabled = true
{{- with .Values.cni }}
bin_dir = {{ .binDir | toJson }}
plugin_dirs = {{ include "skein.toml" .pluginDirs }}
conf_dir = {{ .confDir | toJson }}
exclusive = {{ .exclusive }}
no_masquerade = {{ include "skein.toml" .noMasquerade }}
forward_accept = {{ .forwardAccept }}
chain = {{ include "skein.toml" .chain }}
{{- end }}
masquerade = {{ .Values.masquerade }}
{{- with .Values.firewall }}
{{- if not (and .dropSpoofed .dropCleartext .dropTransit .masqueradeForeign .notrack) }}

[firewall]
{{- if not .dropSpoofed }}
drop_spoofed = false
{{- end }}
{{- if not .dropCleartext }}
drop_cleartext = false
{{- end }}
{{- if not .dropTransit }}
drop_transit = false
{{- end }}
{{- if not .masqueradeForeign }}
masquerade_foreign = false
{{- end }}
{{- if not .notrack }}
notrack = false
{{- end }}
{{- end }}
{{- end }}
{{- if ne .Values.policy.mode "off" }}

[policy]
mode = {{ .Values.policy.mode | toJson }}
{{- end }}

[log]
level = {{ .Values.log.level | toJson }}
format = {{ .Values.log.format | toJson }}
{{- end }}

{{/* "true" if the API server has ValidatingAdmissionPolicy. Offline, as in `helm template`, only the
version is known. */}}
{{- define "skein.hasAdmissionPolicy" -}}
{{- $api := "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy" -}}
{{- if or (.Capabilities.APIVersions.Has $api) (semverCompare ">=1.30-0" .Capabilities.KubeVersion.Version) }}true{{ end }}
{{- end }}

{{/* Common fields of every pod. hostNetwork: these pods provide the network that other pods wait for. */}}
{{- define "skein.pod" -}}
hostNetwork: true
{{- /* The node's resolver: the cluster's DNS needs the network that these pods provide. */}}
dnsPolicy: Default
priorityClassName: {{ .Values.priorityClassName | quote }}
terminationGracePeriodSeconds: {{ int .Values.terminationGracePeriodSeconds }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Image, environment, permissions and mounts of the containers agent and cleanup. */}}
{{- define "skein.agentContainer" -}}
image: {{ include "skein.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
env:
  - name: SKEIN_NODE_NAME
    valueFrom:
      fieldRef:
        fieldPath: spec.nodeName
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
securityContext:
  {{- include "skein.security" (dict "privileged" .Values.privileged "add" .Values.capabilities.agent) | nindent 2 }}
volumeMounts:
  - { name: config, mountPath: /etc/skein, readOnly: true }
  - { name: state, mountPath: /var/lib/skein }
  - { name: run, mountPath: /run/skein }
  # Namespaces of later pods must be visible, too.
  - { name: netns, mountPath: /run/netns, mountPropagation: HostToContainer }
  # The runtime mounts /proc/sys read-only, and refuses mounts below /proc.
  - { name: sysctl, mountPath: /host/proc/sys/net }
  # The agent creates the interface, the keeper opens its queues.
  - { name: tun, mountPath: /dev/net/tun }
  - { name: cni-bin, mountPath: {{ .Values.cni.binDir | quote }} }
  - { name: cni-conf, mountPath: {{ .Values.cni.confDir | quote }} }
  {{- range $index, $path := .Values.cni.pluginDirs }}
  - { name: cni-plugins-{{ $index }}, mountPath: {{ $path | quote }}, readOnly: true }
  {{- end }}
{{- end }}

{{- define "skein.security" -}}
{{- if .privileged -}}
privileged: true
{{- else -}}
privileged: false
capabilities:
  drop: [ALL]
  add: {{ toJson .add }}
{{- end }}
readOnlyRootFilesystem: true
seccompProfile:
  type: RuntimeDefault
runAsUser: 0
runAsGroup: 0
{{- end }}

{{/* Security context of containers that need no permissions. */}}
{{- define "skein.harmless" -}}
securityContext:
  allowPrivilegeEscalation: false
  capabilities:
    drop: [ALL]
  readOnlyRootFilesystem: true
  seccompProfile:
    type: RuntimeDefault
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
{{- end }}

{{- define "skein.volumes" -}}
- name: config
  configMap:
    name: skein
- name: state
  hostPath: { path: /var/lib/skein, type: DirectoryOrCreate }
- name: run
  hostPath: { path: /run/skein, type: DirectoryOrCreate }
- name: netns
  hostPath: { path: /run/netns, type: DirectoryOrCreate }
- name: sysctl
  hostPath: { path: /proc/sys/net, type: Directory }
- name: tun
  hostPath: { path: /dev/net/tun, type: CharDevice }
- name: cni-bin
  hostPath: { path: {{ .Values.cni.binDir | quote }}, type: DirectoryOrCreate }
- name: cni-conf
  hostPath: { path: {{ .Values.cni.confDir | quote }}, type: DirectoryOrCreate }
{{- range $index, $path := .Values.cni.pluginDirs }}
- name: cni-plugins-{{ $index }}
  hostPath: { path: {{ $path | quote }} }
{{- end }}
{{- end }}

{{/* Names are fixed: one release a namespace, as the selectors of Services and budgets want it. */}}
{{- define "nomad-watchdog.labels" -}}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "nomad-watchdog.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "nomad-watchdog.devices" -}}
{{ .Values.devices.namespace | default .Release.Namespace }}
{{- end }}

{{/* The namespaces of the agents, as a YAML list: NAME, NAME-1, … */}}
{{- define "nomad-watchdog.namespaces" -}}
{{- $first := include "nomad-watchdog.devices" . }}
{{- range $number := until (int .Values.devices.namespaces) }}
- {{ if $number }}{{ printf "%s-%d" $first $number | quote }}{{ else }}{{ $first | quote }}{{ end }}
{{- end }}
{{- end }}

{{/* What every pod of ours needs; goes over the configuration. */}}
{{- define "nomad-watchdog.common-env" -}}
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: NOMAD_WATCHDOG_CONFIG
  value: /etc/nomad-watchdog/nomad-watchdog.hcl
- name: NOMAD_WATCHDOG_DATA_DIR
  value: /var/lib/nomad-watchdog
{{- with .Values.consul.tokenSecret }}
- name: CONSUL_HTTP_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: token
{{- end }}
{{- end }}

{{- define "nomad-watchdog.scheme" -}}
{{ if .Values.api.tlsSecret }}https{{ else }}http{{ end }}
{{- end }}

{{/* What the control plane needs besides. */}}
{{- define "nomad-watchdog.env" -}}
{{ include "nomad-watchdog.common-env" . }}
- name: NOMAD_WATCHDOG_KUBERNETES_NAMESPACE
  {{- if .Values.devices.namespace }}
  value: {{ .Values.devices.namespace | quote }}
  {{- else }}
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
  {{- end }}
{{- if gt (int .Values.devices.namespaces) 1 }}
- name: NOMAD_WATCHDOG_KUBERNETES_NAMESPACES
  value: {{ .Values.devices.namespaces | quote }}
{{- end }}
- name: NOMAD_WATCHDOG_API_LISTEN
  value: 0.0.0.0:9670
- name: NOMAD_WATCHDOG_API_ADVERTISE
  value: {{ .Values.api.advertise | default (printf "%s://nomad-watchdog.%s.svc:9670" (include "nomad-watchdog.scheme" .) .Release.Namespace) | quote }}
{{- with .Values.api.hosts }}
- name: NOMAD_WATCHDOG_API_HOSTS
  value: {{ join "," . | quote }}
{{- end }}
- name: NOMAD_WATCHDOG_API_OWN_ADDRESS
  value: {{ include "nomad-watchdog.scheme" . }}://$(POD_IP):9670
- name: NOMAD_WATCHDOG_API_TOKEN_FILE
  value: /etc/nomad-watchdog/api/token
- name: NOMAD_WATCHDOG_API_AGENT_KEY_FILE
  value: /etc/nomad-watchdog/api/agent-key
{{- if .Values.api.tlsSecret }}
- name: NOMAD_WATCHDOG_API_TLS_CERT
  value: /etc/nomad-watchdog/tls/tls.crt
- name: NOMAD_WATCHDOG_API_TLS_KEY
  value: /etc/nomad-watchdog/tls/tls.key
- name: NOMAD_WATCHDOG_API_CA_CERT
  value: /etc/nomad-watchdog/tls/ca.crt
{{- end }}
{{- end }}

{{/* A list of variables, and the user's, which replace ours of the same name: dict "env" LIST "root" . */}}
{{- define "nomad-watchdog.with-theirs" -}}
{{- $theirs := dict }}
{{- range .root.Values.env }}{{ $_ := set $theirs .name true }}{{ end }}
{{- $all := list }}
{{- range fromYamlArray .env }}
{{- if not (hasKey $theirs .name) }}{{ $all = append $all . }}{{ end }}
{{- end }}
{{- toYaml (concat $all .root.Values.env) }}
{{- end }}

{{- define "nomad-watchdog.pod-security" -}}
runAsNonRoot: true
runAsUser: 65534
runAsGroup: 65534
fsGroup: 65534
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "nomad-watchdog.container-security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Where a pod goes, and with which right to pull its image. */}}
{{- define "nomad-watchdog.placing" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

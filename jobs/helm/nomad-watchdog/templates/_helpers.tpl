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

{{/* What only the pod knows; goes over the configuration. */}}
{{- define "nomad-watchdog.env" -}}
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: NOMAD_WATCHDOG_CONFIG
  value: /etc/nomad-watchdog/nomad-watchdog.hcl
- name: NOMAD_WATCHDOG_DATA_DIR
  value: /var/lib/nomad-watchdog
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
  value: {{ .Values.api.advertise | default (printf "http://nomad-watchdog.%s.svc:9670" .Release.Namespace) | quote }}
- name: NOMAD_WATCHDOG_API_OWN_ADDRESS
  value: http://$(POD_IP):9670
- name: NOMAD_WATCHDOG_API_TOKEN_FILE
  value: /etc/nomad-watchdog/api/token
- name: NOMAD_WATCHDOG_API_AGENT_KEY_FILE
  value: /etc/nomad-watchdog/api/agent-key
{{- with .Values.consul.tokenSecret }}
- name: CONSUL_HTTP_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: token
{{- end }}
{{- end }}

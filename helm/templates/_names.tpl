{{- /*
At most 40 characters, because labels made of a name have at most 63. The longest is the label of a group's pods,
NAME-group-INDEX-HASH.
*/ -}}
{{- define "astra.cut" -}}
{{- regexReplaceAll "-+$" (trunc 40 .) "" -}}
{{- end -}}

{{- define "astra.name" -}}
{{- include "astra.cut" (default .Chart.Name .Values.nameOverride) -}}
{{- end -}}

{{- define "astra.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- include "astra.cut" .Values.fullnameOverride -}}
{{- else if contains (include "astra.name" .) .Release.Name -}}
{{- include "astra.cut" .Release.Name -}}
{{- else -}}
{{- include "astra.cut" (printf "%s-%s" .Release.Name (include "astra.name" .)) -}}
{{- end -}}
{{- end -}}

{{- define "astra.picker" -}}
{{ include "astra.fullname" . }}-picker
{{- end -}}

{{- /* Labels that never change, because the selector of a Deployment cannot change. */ -}}
{{- define "astra.selector" -}}
app.kubernetes.io/name: {{ include "astra.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: server
{{- end -}}

{{- /* Labels of the pods that answer requests: in a group of nodes, of the leader only. */ -}}
{{- define "astra.serving" -}}
{{ include "astra.selector" . }}
{{- if gt (int .Values.nodes) 1 }}
leaderworkerset.sigs.k8s.io/worker-index: "0"
{{- end }}
{{- end -}}

{{- define "astra.pickerSelector" -}}
app.kubernetes.io/name: {{ include "astra.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: picker
{{- end -}}

{{- define "astra.labels" -}}
app.kubernetes.io/name: {{ include "astra.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "astra.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- define "astra.pullSecrets" -}}
{{- with .Values.image.pullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end -}}
{{- end -}}

{{- /* Reference to the workload, for autoscalers. */ -}}
{{- define "astra.workload" -}}
{{- if gt (int .Values.nodes) 1 -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
{{- else -}}
apiVersion: apps/v1
kind: Deployment
{{- end }}
name: {{ include "astra.workloadName" . }}
{{- end -}}

{{- /* A LeaderWorkerSet creates a headless Service with its own name, which must differ from the chart's Services. */ -}}
{{- define "astra.workloadName" -}}
{{ include "astra.fullname" . }}{{ if gt (int .Values.nodes) 1 }}-group{{ end }}
{{- end -}}

{{- /* Not empty if the pod uses a claim that only pods on one node, or only one pod, can mount. */ -}}
{{- define "astra.claimsANode" -}}
{{- range list .Values.store.claim .Values.base.claim .Values.adaptersClaim -}}
{{- if and .name (has .accessMode (list "ReadWriteOnce" "ReadWriteOncePod")) }}true{{ end -}}
{{- end -}}
{{- end -}}

{{- define "astra.mostReplicas" -}}
{{- if eq .Values.autoscaling.kind "none" -}}
{{ int .Values.replicas }}
{{- else -}}
{{ int .Values.autoscaling.maxReplicas }}
{{- end -}}
{{- end -}}

{{- /* Seconds until the endpoints of an ending pod are removed: a tenth of drainSeconds, between 1 and 15. */ -}}
{{- define "astra.preStopSeconds" -}}
{{ max 1 (min 15 (div (int .Values.drainSeconds) 10)) }}
{{- end -}}

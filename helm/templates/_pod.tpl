{{- /*
A pod of the server. The argument is a list (context, role): role is "server", or "leader" or "worker" in a group of nodes.
Nothing here depends on the adapters, so that a change of the document restarts no pod.
*/ -}}
{{- define "astra.pod" -}}
{{- $ := index . 0 -}}
{{- $role := index . 1 -}}
{{- $v := $.Values -}}
metadata:
  labels:
    {{- merge (include "astra.selector" $ | fromYaml) $v.podLabels | toYaml | nindent 4 }}
  {{- with $v.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "astra.fullname" $ }}
  automountServiceAccountToken: false
  # A Service with the name "vllm" would set VLLM_PORT, a variable that the engine reads for its own port.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add (include "astra.preStopSeconds" $) (int $v.drainSeconds) 60 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: {{ int $v.podSecurity.user }}
    runAsGroup: {{ int $v.podSecurity.user }}
    fsGroup: {{ int $v.podSecurity.user }}
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  {{- with include "astra.pullSecrets" $ | trim }}{{ . | nindent 2 }}{{ end }}
  {{- with $v.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    - {{- merge (deepCopy .) (dict "labelSelector" (dict "matchLabels" (include "astra.selector" $ | fromYaml))) | toYaml | nindent 6 }}
    {{- end }}
  {{- end }}
  {{- with $v.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- with $v.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- if contains "://" $v.base.source }}
  initContainers:
    - name: base
      image: {{ include "astra.image" $ }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      command: [python3, -c]
      args:
        - |
          import sys
          import fsspec
          system, path = fsspec.core.url_to_fs(sys.argv[1])
          system.get(path.rstrip("/") + "/", sys.argv[2], recursive=True)
        - {{ $v.base.source | quote }}
        - {{ include "astra.base" $ }}
      {{- include "astra.environment" (list $ "copy") | nindent 6 }}
      {{- include "astra.security" $ | nindent 6 }}
      resources:
        {{- toYaml $v.resources | nindent 8 }}
      volumeMounts:
        - {name: base, mountPath: /base}
        - {name: home, mountPath: /home/astra}
        - {name: tmp, mountPath: /tmp}
        {{- with include "astra.moreMounts" $ | trim }}{{ . | nindent 8 }}{{ end }}
  {{- end }}
  containers:
    - name: astra-serve
      image: {{ include "astra.image" $ }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      args:
        {{- include "astra.args" . | nindent 8 }}
      {{- include "astra.environment" . | nindent 6 }}
      {{- include "astra.security" $ | nindent 6 }}
      resources:
        {{- include "astra.resources" $ | nindent 8 }}
      {{- if ne $role "worker" }}
      ports:
        - {name: http, containerPort: 8000, protocol: TCP}
        {{- if $v.admin.secret }}
        - {name: admin, containerPort: {{ int $v.admin.port }}, protocol: TCP}
        {{- end }}
        {{- if $v.policies.secret }}
        - {name: policies, containerPort: {{ int $v.policies.port }}, protocol: TCP}
        {{- end }}
      startupProbe:
        httpGet: {path: /livez, port: http}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: {{ max 1 (div (add (int $v.startupSeconds) 9) 10) }}
      readinessProbe:
        httpGet: {path: /readyz, port: http}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 2
      livenessProbe:
        httpGet: {path: /livez, port: http}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: 6
      lifecycle:
        preStop:
          exec:
            command: [sleep, {{ include "astra.preStopSeconds" $ | quote }}]
      {{- else }}
      # All pods of a group are stopped at the same time. A worker computes until its leader has drained.
      lifecycle:
        preStop:
          exec:
            command:
              - python3
              - -c
              - |
                import os, time, urllib.request
                try:
                    while urllib.request.urlopen("http://" + os.environ["LWS_LEADER_ADDRESS"] + ":8000/livez", timeout=10):
                        time.sleep(1)
                except OSError:
                    pass
      {{- end }}
      volumeMounts:
        - {name: home, mountPath: /home/astra}
        - {name: tmp, mountPath: /tmp}
        - {name: store, mountPath: /store}
        {{- if $v.shm }}
        - {name: shm, mountPath: /dev/shm}
        {{- end }}
        {{- if or $v.base.claim.name (contains "://" $v.base.source) }}
        - name: base
          mountPath: /base
          readOnly: true
          {{- with $v.base.claim.subPath }}
          subPath: {{ . | quote }}
          {{- end }}
        {{- end }}
        {{- if $v.adaptersClaim.name }}
        - {name: adapters, mountPath: /adapters{{ if not (include "astra.changes" (list $ $role)) }}, readOnly: true{{ end }}}
        {{- end }}
        {{- if and (include "astra.inConfigMap" $) (ne $role "worker") }}
        # The whole folder, because Kubernetes does not update a single file that is mounted by subPath.
        - {name: document, mountPath: /etc/astra, readOnly: true}
        {{- end }}
        {{- if and (include "astra.keysSecret" $) (ne $role "worker") }}
        - {name: keys, mountPath: /etc/astra-keys, readOnly: true}
        {{- end }}
        {{- with include "astra.moreMounts" $ | trim }}{{ . | nindent 8 }}{{ end }}
  volumes:
    - name: home
      emptyDir:
        sizeLimit: {{ toYaml $v.base.size }}
    - name: tmp
      emptyDir:
        sizeLimit: 10Gi
    - name: store
      {{- if $v.store.claim.name }}
      persistentVolumeClaim:
        claimName: {{ $v.store.claim.name | quote }}
      {{- else }}
      emptyDir:
        sizeLimit: {{ toYaml $v.store.size }}
      {{- end }}
    {{- if $v.shm }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ toYaml $v.shm }}
    {{- end }}
    {{- if $v.base.claim.name }}
    - name: base
      persistentVolumeClaim:
        claimName: {{ $v.base.claim.name | quote }}
        readOnly: true
    {{- else if contains "://" $v.base.source }}
    - name: base
      emptyDir:
        sizeLimit: {{ toYaml $v.base.size }}
    {{- end }}
    {{- with $v.adaptersClaim.name }}
    - name: adapters
      persistentVolumeClaim:
        claimName: {{ . | quote }}
        {{- if not (include "astra.changes" (list $ $role)) }}
        readOnly: true
        {{- end }}
    {{- end }}
    {{- if and (include "astra.inConfigMap" $) (ne $role "worker") }}
    - name: document
      configMap:
        name: {{ include "astra.fullname" $ }}-adapters
    {{- end }}
    {{- if and (include "astra.keysSecret" $) (ne $role "worker") }}
    - name: keys
      secret:
        secretName: {{ $v.tenants.keys | quote }}
    {{- end }}
    {{- range $v.volumes }}
    - name: more-{{ .name }}
      {{- with .secret }}
      secret: {secretName: {{ . | quote }}}
      {{- end }}
      {{- with .configMap }}
      configMap: {name: {{ . | quote }}}
      {{- end }}
      {{- with .claim }}
      persistentVolumeClaim: {claimName: {{ . | quote }}, readOnly: true}
      {{- end }}
    {{- end }}
{{- end -}}

{{- /* The value of --base. A base from an object store is copied to /base/NAME. */ -}}
{{- define "astra.base" -}}
{{- if contains "://" .Values.base.source -}}
/base/{{ .Values.base.source | trimSuffix "/" | base }}
{{- else -}}
{{ .Values.base.source }}
{{- end -}}
{{- end -}}

{{- /*
The option for the store. Each server uses its own folder of a claim, because an old and a new pod may run at the same
time. The nodes of a group share one folder.
*/ -}}
{{- define "astra.store" -}}
{{- if gt (int .Values.nodes) 1 -}}
--store=/store/group-$(GROUP)
{{- else if .Values.store.claim.name -}}
--shared-store=/store
{{- else -}}
--store=/store/{{ include "astra.fullname" . }}
{{- end -}}
{{- end -}}

{{- /* Not empty if the document is in the chart's ConfigMap. */ -}}
{{- define "astra.inConfigMap" -}}
{{- if not (or .Values.adaptersUrl .Values.adaptersFile) }}true{{ end -}}
{{- end -}}

{{- /* Not empty if a pod of the role writes into adaptersClaim: the document, and uploads. */ -}}
{{- define "astra.changes" -}}
{{- if and (index . 0).Values.adaptersFile (ne (index . 1) "worker") }}true{{ end -}}
{{- end -}}

{{- /* Not empty if the keys document is in a Secret, and not at a URL. */ -}}
{{- define "astra.keysSecret" -}}
{{- with .Values.tenants.keys }}{{ if not (contains "://" .) }}true{{ end }}{{ end -}}
{{- end -}}

{{- define "astra.args" -}}
{{- $ := index . 0 -}}
{{- $role := index . 1 -}}
{{- $v := $.Values -}}
- --base={{ include "astra.base" $ }}
- --max-loras={{ int $v.engine.maxLoras }}
- --max-lora-rank={{ int $v.engine.maxLoraRank }}
- --resident={{ int $v.engine.resident }}
{{- if gt (int $v.gpu.count) 0 }}
- --tensor-parallel-size={{ int $v.gpu.count }}
{{- end }}
{{- if gt (int $v.nodes) 1 }}
- --pipeline-parallel-size={{ int $v.nodes }}
- --nnodes={{ int $v.nodes }}
- --node-rank=$(LWS_WORKER_INDEX)
- --master-addr=$(LWS_LEADER_ADDRESS)
{{- end }}
- --adapters={{ coalesce $v.adaptersUrl $v.adaptersFile "/etc/astra/adapters.yaml" }}
{{- if eq $role "worker" }}
- --headless
{{- else }}
- {{ include "astra.store" $ }}
- --adapter-root=/adapters
- --drain-seconds={{ int $v.drainSeconds }}
- --log-format=json
- --host=0.0.0.0
- --port=8000
{{- if $v.admin.secret }}
- --admin-host=0.0.0.0
- --admin-port={{ int $v.admin.port }}
{{- end }}
{{- with $v.uploadTo }}
- --upload-to={{ . }}
{{- end }}
{{- if $v.policies.secret }}
- --policy-host=0.0.0.0
- --policy-port={{ int $v.policies.port }}
{{- end }}
{{- with $v.tenants.keys }}
- --keys={{ include "astra.keysSecret" $ | empty | ternary . "/etc/astra-keys/keys.yaml" }}
{{- end }}
{{- end }}
{{- range $v.engine.args }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{- /* Each role gets the secrets that it needs; "copy", which copies the base, gets those of the object store only. */ -}}
{{- define "astra.environment" -}}
{{- $role := index . 1 -}}
{{- $v := (index . 0).Values -}}
env:
  - {name: HOME, value: /home/astra}
  # A user id that is not in the image has no name.
  - {name: USER, value: astra}
  {{- if gt (int $v.nodes) 1 }}
  - name: GROUP
    valueFrom: {fieldRef: {fieldPath: "metadata.labels['leaderworkerset.sigs.k8s.io/group-index']"}}
  {{- end }}
  {{- with $v.hubToken }}{{ if and .secret (ne $role "copy") }}
  - name: HF_TOKEN
    valueFrom: {secretKeyRef: {name: {{ .secret | quote }}, key: {{ .key | quote }}}}
  {{- end }}{{ end }}
  {{- with $v.apiKey }}{{ if and .secret (has $role (list "server" "leader")) }}
  - name: VLLM_API_KEY
    valueFrom: {secretKeyRef: {name: {{ .secret | quote }}, key: {{ .key | quote }}}}
  {{- end }}{{ end }}
  {{- with $v.admin }}{{ if and .secret (has $role (list "server" "leader")) }}
  - name: ASTRA_ADMIN_TOKEN
    valueFrom: {secretKeyRef: {name: {{ .secret | quote }}, key: {{ .key | quote }}}}
  {{- end }}{{ end }}
  {{- with $v.policies }}{{ if and .secret (has $role (list "server" "leader")) }}
  - name: ASTRA_POLICY_TOKEN
    valueFrom: {secretKeyRef: {name: {{ .secret | quote }}, key: {{ .key | quote }}}}
  {{- end }}{{ end }}
  {{- with $v.tenants.limitsStore }}{{ if and .secret (has $role (list "server" "leader")) }}
  # The URL contains a password, which would be visible in the arguments of the process.
  - name: ASTRA_LIMITS_STORE
    valueFrom: {secretKeyRef: {name: {{ .secret | quote }}, key: {{ .key | quote }}}}
  {{- end }}{{ end }}
  {{- with $v.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $v.objectStore.secret }}
envFrom:
  - secretRef: {name: {{ . | quote }}}
{{- end }}
{{- end -}}

{{- define "astra.moreMounts" -}}
{{- range .Values.volumes }}
- {{ merge (dict "name" (printf "more-%s" .name) "readOnly" true) (pick . "mountPath" "subPath") | toJson }}
{{- end -}}
{{- end -}}

{{- define "astra.security" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: {{ .Values.podSecurity.readOnlyRootFilesystem }}
  capabilities:
    drop: [ALL]
{{- end -}}

{{- define "astra.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if gt (int .Values.gpu.count) 0 -}}
{{- $gpus := dict .Values.gpu.resource (int .Values.gpu.count | toString) -}}
{{- $_ := set $resources "limits" (merge (default dict $resources.limits) $gpus) -}}
{{- $_ := set $resources "requests" (merge (default dict $resources.requests) $gpus) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

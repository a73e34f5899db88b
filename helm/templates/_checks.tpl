{{- /* What a schema cannot say, checked before anything is rendered. */ -}}
{{- define "astra.checks" -}}
{{- $v := .Values -}}
{{- if and $v.adapters $v.adaptersUrl -}}
  {{- fail "adapters and adaptersUrl are both set: the desired state is in one place" -}}
{{- end -}}
{{- $fullname := include "astra.fullname" . -}}
{{- if or (not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $fullname)) (has $fullname (list "on" "off" "yes" "no" "true" "false" "null" "y" "n")) -}}
  {{- fail (printf "no Service may have the name %q: set fullnameOverride, to lower-case letters, digits and '-', a letter first" $fullname) -}}
{{- end -}}
{{- $names := list -}}
{{- $sources := list -}}
{{- $pinned := 0 -}}
{{- range $v.adapters -}}
  {{- if has .name $names -}}
    {{- fail (printf "two adapters are named %q: names must differ" .name) -}}
  {{- end -}}
  {{- $names = append $names .name -}}
  {{- if eq .name (include "astra.base" $ | base) -}}
    {{- fail (printf "adapter %q has the base's name: requests for the base would get the adapter" .name) -}}
  {{- end -}}
  {{- if .pin -}}{{- $pinned = add $pinned (ternary 2 1 (hasKey . "canary")) -}}{{- end -}}
  {{- if gt (int (default 0 .rank)) (int $v.engine.maxLoraRank) -}}
    {{- fail (printf "adapter %q has rank %v, the engine takes up to %v: raise engine.maxLoraRank" .name .rank $v.engine.maxLoraRank) -}}
  {{- end -}}
  {{- with .canary -}}
    {{- if or (le (float64 .weight) 0.0) (ge (float64 .weight) 1.0) -}}
      {{- fail (printf "the canary's weight is %v: it must be above 0 and below 1" .weight) -}}
    {{- end -}}
  {{- end -}}
  {{- $name := .name -}}
  {{- $mine := compact (list .source (dig "canary" "version" "" .)) -}}
  {{- $sources = concat $sources $mine -}}
  {{- range .previous -}}
    {{- if kindIs "map" . -}}{{- $sources = append $sources (dig "source" "" .) -}}{{- end -}}
  {{- end -}}
  {{- range $mine -}}
    {{- if hasPrefix "sha256:" . -}}
      {{- if or (not $v.store.claim.name) (gt (int (include "astra.mostReplicas" $)) 1) -}}
        {{- fail (printf "adapter %q comes from the store, which is empty in a new pod, and each server's own: give its source" $name) -}}
      {{- end -}}
    {{- else if not (contains "://" .) -}}
      {{- if regexMatch "^[^/.~][^/]*/[^/]+$" . -}}
        {{- fail (printf "adapter %q comes from the folder %q: if it is on the hub, say hf://%s" $name . .) -}}
      {{- else if not $v.adaptersClaim.name -}}
        {{- fail (printf "adapter %q comes from the folder %q: set adaptersClaim.name, which is mounted at /adapters" $name .) -}}
      {{- else if not (hasPrefix "/adapters/" .) -}}
        {{- fail (printf "adapter %q comes from the folder %q: adaptersClaim is mounted at /adapters" $name .) -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- range concat (list $v.adaptersUrl $v.base.source) $sources -}}
  {{- if or (regexMatch "//[^/]*@" .) (regexMatch "(?i)[?&][^=&]*(token|secret|password|signature|sig|key|credential)=" .) -}}
    {{- fail "a URL has credentials in it: put them into a Secret, and name it in objectStore.secret" -}}
  {{- end -}}
{{- end -}}
{{- if gt (int $pinned) (int $v.engine.maxLoras) -}}
  {{- fail (printf "%v adapters are pinned, the engine has %v slots: raise engine.maxLoras, or pin fewer" $pinned $v.engine.maxLoras) -}}
{{- end -}}
{{- if gt (int $v.engine.maxLoras) (int $v.engine.resident) -}}
  {{- fail (printf "engine.maxLoras is %v, engine.resident %v: what is in a slot is resident, too" $v.engine.maxLoras $v.engine.resident) -}}
{{- end -}}
{{- if gt (len (include "astra.document" .)) 1000000 -}}
  {{- fail "adapters do not fit into a ConfigMap (1 MB): keep the document in an object store, and name it with adaptersUrl" -}}
{{- end -}}
{{- $replicas := int (include "astra.mostReplicas" .) -}}
{{- $pods := mul $replicas (int $v.nodes) -}}
{{- range $name, $claim := dict "store.claim" $v.store.claim "base.claim" $v.base.claim "adaptersClaim" $v.adaptersClaim -}}
  {{- if and $claim.name (gt $pods 1) (has $claim.accessMode (list "ReadWriteOnce" "ReadWriteOncePod")) -}}
    {{- fail (printf "%s is %s, and there may be %d pods: one of them alone could mount it" $name $claim.accessMode $pods) -}}
  {{- end -}}
{{- end -}}
{{- if and $v.store.claim.name (eq $v.store.claim.accessMode "ReadOnlyMany") -}}
  {{- fail "store.claim is ReadOnlyMany: the server writes into it" -}}
{{- end -}}
{{- if and (eq (int $v.rollout.maxSurge) 0) (eq (int $v.rollout.maxUnavailable) 0) -}}
  {{- fail "rollout.maxSurge and rollout.maxUnavailable are both 0: nothing could ever be replaced" -}}
{{- end -}}
{{- if gt (int $v.nodes) 1 -}}
  {{- if not (and $v.store.claim.name (eq $v.store.claim.accessMode "ReadWriteMany")) -}}
    {{- fail "nodes is above 1: every node of a group reads the adapters from one store; set store.claim, ReadWriteMany" -}}
  {{- end -}}
  {{- if lt (int $v.gpu.count) 1 -}}
    {{- fail "nodes is above 1, gpu.count is 0: several nodes are for models that do not fit into one node's GPUs" -}}
  {{- end -}}
{{- end -}}
{{- if hasPrefix "hf://" $v.base.source -}}
  {{- fail (printf "base.source is %q: a base on the hub is named ORG/NAME" $v.base.source) -}}
{{- end -}}
{{- if and (hasPrefix "/" $v.base.source) (not $v.base.claim.name) -}}
  {{- fail (printf "base.source is the folder %q: set base.claim.name, which is mounted at /base" $v.base.source) -}}
{{- end -}}
{{- if and $v.base.claim.name (not (or (eq $v.base.source "/base") (hasPrefix "/base/" $v.base.source))) -}}
  {{- fail (printf "base.claim is mounted at /base, and base.source is %q: name the folder in it" $v.base.source) -}}
{{- end -}}
{{- if and (eq $v.autoscaling.kind "none" | not) (gt (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas)) -}}
  {{- fail "autoscaling.minReplicas is above autoscaling.maxReplicas" -}}
{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.host) -}}
  {{- fail "ingress is enabled without ingress.host" -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
  {{- fail "httpRoute is enabled without httpRoute.parentRefs: name the Gateway" -}}
{{- end -}}
{{- /* The Gateway API's own rule: of one parent either all, or one listener each. A port does not tell them apart. */ -}}
{{- $parents := dict -}}
{{- range $v.httpRoute.parentRefs -}}
  {{- $parent := printf "%s/%s/%s/%s" (dig "group" "gateway.networking.k8s.io" .) (dig "kind" "Gateway" .) (dig "namespace" $.Release.Namespace .) .name -}}
  {{- $listeners := default list (get $parents $parent) -}}
  {{- $listener := dig "sectionName" "" . -}}
  {{- if and $listeners (or (has "" (append $listeners $listener)) (has $listener $listeners)) -}}
    {{- fail (printf "httpRoute.parentRefs has %q twice: give each a sectionName of its own" .name) -}}
  {{- end -}}
  {{- $_ := set $parents $parent (append $listeners $listener) -}}
{{- end -}}
{{- /* A list by names: where the engine runs over several nodes, Kubernetes takes none twice. */ -}}
{{- $mine := dict "HOME" "base.size, its room" "USER" "podSecurity.user" "GROUP" "nodes" "HF_TOKEN" "hubToken" "VLLM_API_KEY" "apiKey" "ASTRA_ADMIN_TOKEN" "admin" -}}
{{- $variables := list -}}
{{- range $v.env -}}
  {{- if and .value (regexMatch "(?i)(^|_)(token|secret|password|passwd|api_?key|key)$" .name) -}}
    {{- fail (printf "env has %s in plain: take it from a Secret with valueFrom.secretKeyRef" .name) -}}
  {{- end -}}
  {{- if and (hasKey . "value") (hasKey . "valueFrom") -}}
    {{- fail (printf "env has %s with value and valueFrom: give one" .name) -}}
  {{- end -}}
  {{- if hasKey $mine .name -}}
    {{- fail (printf "env has %s, which is this chart's to set: use %s" .name (get $mine .name)) -}}
  {{- end -}}
  {{- if has .name $variables -}}
    {{- fail (printf "env has %s twice: names must differ" .name) -}}
  {{- end -}}
  {{- $variables = append $variables .name -}}
{{- end -}}
{{- $set := dict
  "base" "base.source" "model" "base.source" "served-model-name" "base.source" "hf-token" "hubToken"
  "adapters" "adapters" "adapter" "adapters" "lora-modules" "adapters" "adapter-root" "adaptersClaim"
  "store" "store" "shared-store" "store"
  "max-loras" "engine.maxLoras" "max-lora-rank" "engine.maxLoraRank" "resident" "engine.resident" "max-cpu-loras" "engine.resident"
  "tensor-parallel-size" "gpu.count" "tp" "gpu.count" "data-parallel-size" "replicas" "dp" "replicas"
  "pipeline-parallel-size" "nodes" "pp" "nodes" "nnodes" "nodes" "n" "nodes" "node-rank" "nodes" "r" "nodes"
  "master-addr" "nodes" "headless" "nodes"
  "drain-seconds" "drainSeconds" "host" "service.type" "port" "service.port" "admin-host" "admin.port" "admin-port" "admin.port"
  "api-key" "apiKey.secret" "ssl-keyfile" "ingress.tlsSecret" "ssl-certfile" "ingress.tlsSecret"
  "config" "engine.args" "disable-log-stats" "monitoring" -}}
{{- range $v.engine.args -}}
  {{- $option := regexReplaceAll "[= ].*" (regexReplaceAll "^-+" . "") "" | replace "_" "-" -}}
  {{- if and (hasPrefix "-" .) (hasKey $set $option) -}}
    {{- fail (printf "engine.args has %s, which is this chart's to set: use %s" (regexReplaceAll "[= ].*" . "") (get $set $option)) -}}
  {{- end -}}
{{- end -}}
{{- if eq (int $v.admin.port) 8000 -}}
  {{- fail "admin.port is 8000, where requests go: take another" -}}
{{- end -}}
{{- if and (eq $v.autoscaling.kind "keda") (not $v.monitoring.serviceMonitor) -}}
  {{- fail "autoscaling.kind=keda asks Prometheus, which scrapes nothing: set monitoring.serviceMonitor" -}}
{{- end -}}
{{- if and $v.monitoring.rules (not $v.monitoring.serviceMonitor) -}}
  {{- fail "monitoring.rules are about what monitoring.serviceMonitor scrapes, by its labels: set that, too" -}}
{{- end -}}
{{- $outside := or $v.ingress.enabled $v.httpRoute.enabled (ne $v.service.type "ClusterIP") -}}
{{- if and $outside (not $v.apiKey.secret) (not $v.apiKey.checkedElsewhere) -}}
  {{- fail "a way in from outside without a key lets everybody in: set apiKey.secret, or apiKey.checkedElsewhere where a gateway asks for one" -}}
{{- end -}}
{{- $volumes := list -}}
{{- range $v.volumes -}}
  {{- if ne (len (compact (list .secret .configMap .claim))) 1 -}}
    {{- fail (printf "volume %q must be one of secret, configMap and claim" .name) -}}
  {{- end -}}
  {{- if has .name $volumes -}}
    {{- fail (printf "two volumes are named %q: names must differ" .name) -}}
  {{- end -}}
  {{- $volumes = append $volumes .name -}}
{{- end -}}
{{- end -}}

{{- /* The desired state as the server reads it: `rank` is for the check above alone. */ -}}
{{- define "astra.document" -}}
{{- $entries := list -}}
{{- range .Values.adapters -}}
  {{- $entries = append $entries (omit . "rank") -}}
{{- end -}}
{{- dict "adapters" $entries | toYaml -}}
{{- end -}}

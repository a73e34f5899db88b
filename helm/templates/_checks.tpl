{{- /* Rules that the schema cannot express, checked before anything is rendered. */ -}}
{{- define "astra.checks" -}}
{{- $v := .Values -}}
{{- if gt (len (compact (list (len $v.adapters | toString | trimPrefix "0") $v.adaptersUrl $v.adaptersFile))) 1 -}}
  {{- fail "two of adapters, adaptersUrl and adaptersFile are set: give the desired state in one of them" -}}
{{- end -}}
{{- $fullname := include "astra.fullname" . -}}
{{- if or (not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $fullname)) (has $fullname (list "on" "off" "yes" "no" "true" "false" "null" "y" "n")) -}}
  {{- fail (printf "%q is not a valid name of a Service: set fullnameOverride to lower-case letters, digits and '-', with a letter first" $fullname) -}}
{{- end -}}
{{- $names := list -}}
{{- $sources := list -}}
{{- $pinned := 0 -}}
{{- range $v.adapters -}}
  {{- if has .name $names -}}
    {{- fail (printf "two adapters are named %q: names must differ" .name) -}}
  {{- end -}}
  {{- $names = append $names .name -}}
  {{- $base := include "astra.base" $ -}}
  {{- if eq .name (hasPrefix "/" $base | ternary (base $base) $base) -}}
    {{- fail (printf "adapter %q has the base's name: requests for the base would get the adapter" .name) -}}
  {{- end -}}
  {{- if .pin -}}{{- $pinned = add $pinned (ternary 2 1 (hasKey . "canary")) -}}{{- end -}}
  {{- if gt (int (default 0 .rank)) (int $v.engine.maxLoraRank) -}}
    {{- fail (printf "adapter %q has rank %v, above engine.maxLoraRank, which is %v: raise it" .name .rank $v.engine.maxLoraRank) -}}
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
        {{- fail (printf "adapter %q has a source in the store, but the store of a new pod is empty and each server has its own: give the source from which the version was published" $name) -}}
      {{- end -}}
    {{- else if not (contains "://" .) -}}
      {{- if regexMatch "^[^/.~][^/]*/[^/]+$" . -}}
        {{- fail (printf "adapter %q has the source %q, which is a folder: for a hub id write hf://%s" $name . .) -}}
      {{- else if not $v.adaptersClaim.name -}}
        {{- fail (printf "adapter %q has the source %q, which is a folder: set adaptersClaim.name, which is mounted at /adapters" $name .) -}}
      {{- else if not (hasPrefix "/adapters/" .) -}}
        {{- fail (printf "adapter %q has the source %q, but adaptersClaim is mounted at /adapters" $name .) -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- range concat (list $v.adaptersUrl $v.base.source $v.uploadTo $v.tenants.keys) $sources -}}
  {{- if or (regexMatch "//[^/]*@" .) (regexMatch "(?i)[?&][^=&]*(token|secret|password|signature|sig|key|credential)=" .) -}}
    {{- fail "a URL contains credentials: put them into a Secret, and set objectStore.secret" -}}
  {{- end -}}
{{- end -}}
{{- if gt (int $pinned) (int $v.engine.maxLoras) -}}
  {{- fail (printf "%v versions are pinned, canaries included, but engine.maxLoras is %v: raise it, or pin fewer" $pinned $v.engine.maxLoras) -}}
{{- end -}}
{{- if gt (int $v.engine.maxLoras) (int $v.engine.resident) -}}
  {{- fail (printf "engine.maxLoras is %v, but engine.resident is %v: resident adapters include those of a batch" $v.engine.maxLoras $v.engine.resident) -}}
{{- end -}}
{{- if gt (len (include "astra.document" .)) 1000000 -}}
  {{- fail "adapters do not fit into a ConfigMap (1 MB): put the document into an object store, and set adaptersUrl" -}}
{{- end -}}
{{- $replicas := int (include "astra.mostReplicas" .) -}}
{{- $pods := mul $replicas (int $v.nodes) -}}
{{- range $name, $claim := dict "store.claim" $v.store.claim "base.claim" $v.base.claim "adaptersClaim" $v.adaptersClaim -}}
  {{- if and $claim.name (gt $pods 1) (has $claim.accessMode (list "ReadWriteOnce" "ReadWriteOncePod")) -}}
    {{- fail (printf "%s is %s, but there may be %d pods, of which only one could mount it" $name $claim.accessMode $pods) -}}
  {{- end -}}
{{- end -}}
{{- if and $v.store.claim.name (eq $v.store.claim.accessMode "ReadOnlyMany") -}}
  {{- fail "store.claim is ReadOnlyMany, but the server writes into it" -}}
{{- end -}}
{{- if $v.adaptersFile -}}
  {{- if or (not $v.adaptersClaim.name) (eq $v.adaptersClaim.accessMode "ReadOnlyMany") -}}
    {{- fail "adaptersFile is a file in adaptersClaim, which the server changes: set adaptersClaim.name, with an accessMode other than ReadOnlyMany" -}}
  {{- end -}}
{{- end -}}
{{- if and $v.uploadTo (not (and $v.adaptersFile $v.admin.secret)) -}}
  {{- fail "uploadTo is for adapters that the admin API receives and writes into the document: set admin.secret and adaptersFile" -}}
{{- end -}}
{{- if and (eq (int $v.rollout.maxSurge) 0) (eq (int $v.rollout.maxUnavailable) 0) -}}
  {{- fail "rollout.maxSurge and rollout.maxUnavailable are both 0: no pod could be replaced" -}}
{{- end -}}
{{- if gt (int $v.nodes) 1 -}}
  {{- if not (and $v.store.claim.name (eq $v.store.claim.accessMode "ReadWriteMany")) -}}
    {{- fail "nodes is above 1, and all nodes of a group read the adapters from one store: set store.claim with ReadWriteMany" -}}
  {{- end -}}
  {{- if lt (int $v.gpu.count) 1 -}}
    {{- fail "nodes is above 1, but gpu.count is 0: several nodes are for models that do not fit into the GPUs of one node" -}}
  {{- end -}}
{{- end -}}
{{- if hasPrefix "hf://" $v.base.source -}}
  {{- fail (printf "base.source is %q: write a base of the hub as ORG/NAME" $v.base.source) -}}
{{- end -}}
{{- if and (hasPrefix "/" $v.base.source) (not $v.base.claim.name) -}}
  {{- fail (printf "base.source is the folder %q: set base.claim.name, which is mounted at /base" $v.base.source) -}}
{{- end -}}
{{- if and $v.base.claim.name (not (or (eq $v.base.source "/base") (hasPrefix "/base/" $v.base.source))) -}}
  {{- fail (printf "base.claim is mounted at /base, but base.source is %q: set base.source to a folder below /base" $v.base.source) -}}
{{- end -}}
{{- if and (eq $v.autoscaling.kind "none" | not) (gt (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas)) -}}
  {{- fail "autoscaling.minReplicas is above autoscaling.maxReplicas" -}}
{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.host) -}}
  {{- fail "ingress.enabled needs ingress.host" -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
  {{- fail "httpRoute.enabled needs httpRoute.parentRefs: name the Gateway" -}}
{{- end -}}
{{- /* A rule of the Gateway API: several references to one parent need different sectionNames; ports do not count. */ -}}
{{- $parents := dict -}}
{{- range $v.httpRoute.parentRefs -}}
  {{- $parent := printf "%s/%s/%s/%s" (dig "group" "gateway.networking.k8s.io" .) (dig "kind" "Gateway" .) (dig "namespace" $.Release.Namespace .) .name -}}
  {{- $listeners := default list (get $parents $parent) -}}
  {{- $listener := dig "sectionName" "" . -}}
  {{- if and $listeners (or (has "" (append $listeners $listener)) (has $listener $listeners)) -}}
    {{- fail (printf "httpRoute.parentRefs has %q twice: give each a different sectionName" .name) -}}
  {{- end -}}
  {{- $_ := set $parents $parent (append $listeners $listener) -}}
{{- end -}}
{{- /* Names of variables must be unique: a LeaderWorkerSet with duplicates is refused. */ -}}
{{- $mine := dict "HOME" "base.size for its size" "USER" "podSecurity.user" "GROUP" "nodes" "HF_TOKEN" "hubToken" "VLLM_API_KEY" "apiKey" "ASTRA_ADMIN_TOKEN" "admin" "ASTRA_POLICY_TOKEN" "policies" "ASTRA_LIMITS_STORE" "tenants.limitsStore" -}}
{{- $variables := list -}}
{{- range $v.env -}}
  {{- if and .value (regexMatch "(?i)(^|_)(token|secret|password|passwd|api_?key|key)$" .name) -}}
    {{- fail (printf "env has the secret %s as plain text: take it from a Secret with valueFrom.secretKeyRef" .name) -}}
  {{- end -}}
  {{- if and (hasKey . "value") (hasKey . "valueFrom") -}}
    {{- fail (printf "env has %s with value and valueFrom: give one of them" .name) -}}
  {{- end -}}
  {{- if hasKey $mine .name -}}
    {{- fail (printf "env has %s, which the chart sets: use %s" .name (get $mine .name)) -}}
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
  "policy-host" "policies.port" "policy-port" "policies.port" "upload-to" "uploadTo"
  "keys" "tenants.keys" "limits-store" "tenants.limitsStore" "api-key" "apiKey.secret" "ssl-keyfile" "ingress.tlsSecret" "ssl-certfile" "ingress.tlsSecret"
  "config" "engine.args" "disable-log-stats" "monitoring" -}}
{{- range $v.engine.args -}}
  {{- $option := regexReplaceAll "[= ].*" (regexReplaceAll "^-+" . "") "" | replace "_" "-" -}}
  {{- if and (hasPrefix "-" .) (hasKey $set $option) -}}
    {{- fail (printf "engine.args has %s, which the chart sets: use %s" (regexReplaceAll "[= ].*" . "") (get $set $option)) -}}
  {{- end -}}
{{- end -}}
{{- if eq (int $v.admin.port) 8000 -}}
  {{- fail "admin.port is 8000, the port of requests: use another port" -}}
{{- end -}}
{{- if eq (int $v.policies.port) 8000 -}}
  {{- fail "policies.port is 8000, the port of requests: use another port" -}}
{{- end -}}
{{- if and $v.policies.secret $v.admin.secret (eq (int $v.policies.port) (int $v.admin.port)) -}}
  {{- fail (printf "policies.port and admin.port are both %d: use two ports" (int $v.admin.port)) -}}
{{- end -}}
{{- if and $v.policies.secret (not $v.adaptersClaim.name) -}}
  {{- fail "policies.secret is set, but there is no folder into which a trainer could write its policies: set adaptersClaim.name, which is mounted at /adapters" -}}
{{- end -}}
{{- if and $v.policies.secret (gt $replicas 1) -}}
  {{- fail (printf "policies.secret is set, but there may be %d replicas: a policy is loaded into the one that gets the call, and the others do not have it; use one replica" $replicas) -}}
{{- end -}}
{{- if and $v.tenants.limitsStore.secret (not $v.tenants.keys) -}}
  {{- fail "tenants.limitsStore is for the limits of the keys document: set tenants.keys" -}}
{{- end -}}
{{- if and $v.tenants.keys $v.monitoring.serviceMonitor (not $v.monitoring.apiKey.secret) -}}
  {{- fail "with tenants.keys /metrics needs a key: add a tenant with `metrics: true` to the keys document, and set monitoring.apiKey.secret to a Secret with its key" -}}
{{- end -}}
{{- if and $v.tenants.keys $v.inferencePool.enabled -}}
  {{- fail "with tenants.keys /metrics needs a key, which the endpoint picker cannot send: use either tenants.keys or inferencePool" -}}
{{- end -}}
{{- if and (eq $v.autoscaling.kind "keda") (not $v.monitoring.serviceMonitor) -}}
  {{- fail "autoscaling.kind=keda needs metrics in Prometheus: set monitoring.serviceMonitor" -}}
{{- end -}}
{{- if and $v.monitoring.rules (not $v.monitoring.serviceMonitor) -}}
  {{- fail "monitoring.rules use labels that monitoring.serviceMonitor adds: set monitoring.serviceMonitor, too" -}}
{{- end -}}
{{- $outside := or $v.ingress.enabled $v.httpRoute.enabled (ne $v.service.type "ClusterIP") -}}
{{- if and $outside (not $v.apiKey.secret) (not $v.tenants.keys) (not $v.apiKey.checkedElsewhere) -}}
  {{- fail "the server is reachable from outside without a key: set apiKey.secret or tenants.keys, or apiKey.checkedElsewhere if a gateway checks keys" -}}
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

{{- /* The document for the server: the adapters without `rank`, which only the check above uses. */ -}}
{{- define "astra.document" -}}
{{- $entries := list -}}
{{- range .Values.adapters -}}
  {{- $entries = append $entries (omit . "rank") -}}
{{- end -}}
{{- dict "adapters" $entries | toYaml -}}
{{- end -}}

{{- /* What cannot be, in a sentence that says the way out. values.schema.json has refused unknown keys and wrong types. */ -}}
{{- define "afd.validate" -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]*[a-z0-9])?$" .Release.Name) }}
{{- fail (printf "the release is called %s: names of Services are made of it, so it must be of a-z, 0-9 and -, and begin with a letter" .Release.Name) }}
{{- end }}
{{- if gt (len (include "afd.name" .)) 36 }}
{{- fail (printf "the release is called %s: names of its pods would be too long, so give it one of up to 32 characters" .Release.Name) }}
{{- end }}
{{- range $path, $count := dict "gateway.replicas" .Values.gateway.replicas "attention.replicas" .Values.attention.replicas "ffn.replicas" .Values.ffn.replicas "ffn.shards" .Values.ffn.shards }}
{{- if lt (int $count) 1 }}
{{- fail (printf "%s is %d, and a mesh needs at least one: to stop it use helm uninstall" $path (int $count)) }}
{{- end }}
{{- end }}
{{- if and .Values.ffn.nextShards (eq (int .Values.ffn.nextShards) (int .Values.ffn.shards)) }}
{{- fail "ffn.nextShards equals ffn.shards: it is the number of shards that the FFN shall be split into next, or 0" }}
{{- end }}
{{- range $role := list "gateway" "attention" }}
{{- $scaling := (get $.Values $role).autoscaling }}
{{- if and $scaling.enabled (gt (int $scaling.minReplicas) (int $scaling.maxReplicas)) }}
{{- fail (printf "%s.autoscaling.minReplicas is %d and maxReplicas is %d: lower the first or raise the second" $role (int $scaling.minReplicas) (int $scaling.maxReplicas)) }}
{{- end }}
{{- end }}
{{- if and .Values.attention.autoscaling.enabled (not .Values.attention.autoscaling.prometheus) }}
{{- fail "attention.autoscaling goes by the mesh's metrics: attention.autoscaling.prometheus must be the URL of the Prometheus that has them" }}
{{- end }}
{{- with .Values.gateway }}
{{- if and .autoscaling.enabled (not (or .resources.requests.cpu .resources.limits.cpu)) }}
{{- fail "gateway.autoscaling goes by a share of the requested CPU: set gateway.resources.requests.cpu" }}
{{- end }}
{{- end }}
{{- include "afd.validateModel" .Values.model }}
{{- include "afd.validateTls" .Values }}
{{- include "afd.validateRedis" .Values.redis }}
{{- include "afd.validateMetrics" .Values }}
{{- include "afd.validateExtras" .Values }}
{{- include "afd.validateDevices" .Values }}
{{- include "afd.validateReshard" . }}
{{- end -}}

{{- define "afd.validateModel" -}}
{{- if not .name }}
{{- fail "model.name is not set: it is what clients call the model by" }}
{{- end }}
{{- if not (or .persistentVolumeClaim .hostPath) }}
{{- fail "nothing says where the model is: set model.persistentVolumeClaim, or model.hostPath for a folder that every node has" }}
{{- end }}
{{- if and .persistentVolumeClaim .hostPath }}
{{- fail "model.persistentVolumeClaim and model.hostPath are both set: the model is in one place" }}
{{- end }}
{{- end -}}

{{- define "afd.validateTls" -}}
{{- $issuer := .tls.certManager.issuer }}
{{- $publicIssuer := .tls.certManager.publicIssuer }}
{{- $given := list }}
{{- $missing := list }}
{{- range $role := list "gateway" "attention" "ffn" }}
{{- if get $.tls.secrets $role }}{{ $given = append $given $role }}{{ else }}{{ $missing = append $missing (printf "tls.secrets.%s" $role) }}{{ end }}
{{- end }}
{{- if and .insecure (or $issuer $given $publicIssuer .tls.secrets.public) }}
{{- fail "insecure is true, and tls says where certificates come from: choose one" }}
{{- end }}
{{- if and $issuer $given }}
{{- fail "tls.certManager.issuer and tls.secrets are both set: the certificates of the roles come from one of them" }}
{{- end }}
{{- if and $publicIssuer .tls.secrets.public }}
{{- fail "tls.certManager.publicIssuer and tls.secrets.public are both set: what clients see comes from one of them" }}
{{- end }}
{{- if and $publicIssuer (not .tls.certManager.publicNames) }}
{{- fail "tls.certManager.publicIssuer is set and publicNames is not: they are the names that its certificate is for" }}
{{- end }}
{{- if not (or .insecure $issuer $given) }}
{{- fail "nothing says where certificates come from: set tls.certManager.issuer, or the four tls.secrets, or insecure: true if something else protects the pods' network" }}
{{- end }}
{{- if and $given (not (or .tls.secrets.public $publicIssuer)) }}{{ $missing = append $missing "tls.secrets.public" }}{{ end }}
{{- if and $given $missing }}
{{- fail (printf "%s %s not set: every role has a certificate of its own, and clients see the public one" (join ", " $missing) (ternary "is" "are" (eq (len $missing) 1))) }}
{{- end }}
{{- end -}}

{{- define "afd.validateRedis" -}}
{{- if not (regexMatch "^([A-Za-z0-9_-]{8,})?$" .password) }}
{{- fail "redis.password must have 8 characters or more of A-Z, a-z, 0-9, _ and -: it is part of a URL" }}
{{- end }}
{{- if not .external.urlKey }}
{{- fail "redis.external.urlKey is empty: it is the key of the URL in the Secret" }}
{{- end }}
{{- if not .external.secret }}
{{- if .external.caKey }}
{{- fail "redis.external.caKey is set and redis.external.secret is not: it is a key of that Secret" }}
{{- end }}
{{- if ne .external.urlKey "url" }}
{{- fail "redis.external.urlKey is set and redis.external.secret is not: it is a key of that Secret" }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "afd.validateMetrics" -}}
{{- if and .networkPolicies.enabled (not .networkPolicies.metrics) }}
{{- range $path, $wanted := dict "monitoring.podMonitor" .monitoring.podMonitor "attention.autoscaling.enabled" .attention.autoscaling.enabled }}
{{- if $wanted }}
{{- fail (printf "%s needs metrics that nobody may read: networkPolicies.metrics must say where Prometheus is, like [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}}]" $path) }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "afd.validateExtras" -}}
{{- range $role := list "gateway" "attention" "ffn" }}
{{- $values := get $ $role }}
{{- $names := list }}
{{- range $values.extraEnv }}
{{- if regexMatch "^(AFD_.*|POD_IP|WORKER_INDEX)$" .name }}
{{- fail (printf "%s.extraEnv has %s: AFD_* are %s.settings, and POD_IP and WORKER_INDEX are the chart's own" $role .name $role) }}
{{- end }}
{{- if and $.telemetry.otlpEndpoint (has .name (list "OTEL_EXPORTER_OTLP_ENDPOINT" "OTEL_RESOURCE_ATTRIBUTES")) }}
{{- fail (printf "%s.extraEnv has %s, which telemetry.otlpEndpoint sets: leave one of them out" $role .name) }}
{{- end }}
{{- if has .name $names }}
{{- fail (printf "%s.extraEnv has %s twice: a variable has one value" $role .name) }}
{{- end }}
{{- if and (hasKey . "value") (hasKey . "valueFrom") }}
{{- fail (printf "%s.extraEnv has %s with value and valueFrom: leave one of them out" $role .name) }}
{{- end }}
{{- $names = append $names .name }}
{{- end }}
{{- $volumes := list "model" "tmp" "shm" "tls" "public-tls" "redis-ca" }}
{{- range $values.extraVolumes }}
{{- if has .name $volumes }}
{{- fail (printf "%s.extraVolumes has %s, which is there already: give it another name" $role .name) }}
{{- end }}
{{- $volumes = append $volumes .name }}
{{- end }}
{{- $places := list "/model" "/tmp" "/dev/shm" "/etc/afd/tls" "/etc/afd/public-tls" "/etc/afd/redis" }}
{{- range $values.extraVolumeMounts }}
{{- if not (has .name $volumes) }}
{{- fail (printf "%s.extraVolumeMounts has %s, and no volume is called so: add it to %s.extraVolumes" $role .name $role) }}
{{- end }}
{{- $place := clean .mountPath }}
{{- if has $place $places }}
{{- fail (printf "%s.extraVolumeMounts has %s, where something is mounted already: choose another place" $role .mountPath) }}
{{- end }}
{{- $places = append $places $place }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "afd.validateDevices" -}}
{{- range $role := list "attention" "ffn" }}
{{- $values := get $ $role }}
{{- range $kind := list "gpu" "rdma" }}
{{- $device := get $values $kind }}
{{- if and $device.count (hasKey $values.resources.limits $device.resource) }}
{{- fail (printf "%s.resources.limits has %s, which %s.%s.count sets: leave it out of the limits" $role $device.resource $role $kind) }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* The layout in Redis stays until `afd layout` begins another one: without its shards nothing would serve. */ -}}
{{- define "afd.validateReshard" -}}
{{- $kinds := dict "StatefulSet" "apps/v1" }}
{{- if .Capabilities.APIVersions.Has "leaderworkerset.x-k8s.io/v1" }}
{{- $_ := set $kinds "LeaderWorkerSet" "leaderworkerset.x-k8s.io/v1" }}
{{- end }}
{{- $ffn := printf "%s-ffn" (include "afd.name" .) }}
{{- $there := list }}
{{- range $kind, $api := $kinds }}
{{- range (lookup $api $kind $.Release.Namespace "").items }}
{{- if regexMatch (printf "^%s(-[0-9]+)?-of-[0-9]+$" $ffn) .metadata.name }}{{ $there = append $there .metadata.name }}{{ end }}
{{- end }}
{{- end }}
{{- $wanted := printf "%s%s-of-%d" $ffn (ternary "" "-0" .Values.ffn.leaderWorkerSet) (int .Values.ffn.shards) }}
{{- $others := list }}
{{- range $there }}
{{- if not (regexMatch (printf "^%s%s-of-%d$" $ffn (ternary "" "-[0-9]+" $.Values.ffn.leaderWorkerSet) (int $.Values.ffn.shards)) .) }}{{ $others = append $others . }}{{ end }}
{{- end }}
{{- if and $others (not (has $wanted $there)) }}
{{- fail (printf "there is no %s, and the mesh has %s: keep ffn.shards and ffn.leaderWorkerSet as they are, and let other shards come up through ffn.nextShards first (the chart's README, Other shards)" $wanted (join ", " (sortAlpha $others))) }}
{{- end }}
{{- end -}}

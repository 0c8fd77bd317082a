{{- define "afd.name" -}}
{{- ternary .Release.Name (printf "%s-afd" .Release.Name) (contains "afd" .Release.Name) -}}
{{- end -}}

{{- /* What the pods of a role are found by: (root, role, and labels that narrow it). */ -}}
{{- define "afd.selector" -}}
app.kubernetes.io/name: afd
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .role }}
{{- with .labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "afd.labels" -}}
{{ include "afd.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "afd.metadata" -}}
name: {{ include "afd.name" .root }}-{{ .name | default .role }}
labels: {{- include "afd.labels" . | nindent 2 }}
{{- end -}}

{{- define "afd.image" -}}
{{- $values := get .root.Values .role -}}
{{ .root.Values.image.registry }}afd-{{ .role }}:{{ $values.imageTag | default .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end -}}

{{- define "afd.mesh" -}}
{{ .Values.mesh | default (printf "%s.%s" .Release.Namespace .Release.Name) }}
{{- end -}}

{{- /* How many pods: where they are scaled, as many as run. (root, role, kind) */ -}}
{{- define "afd.replicas" -}}
{{- $values := get .root.Values .role -}}
{{- $running := lookup "apps/v1" .kind .root.Release.Namespace (printf "%s-%s" (include "afd.name" .root) .role) -}}
{{- if $values.autoscaling.enabled -}}
{{ dig "spec" "replicas" 0 $running | default $values.autoscaling.minReplicas }}
{{- else -}}
{{ $values.replicas }}
{{- end -}}
{{- end -}}

{{- /* The Secret with a role's certificate, or with the public one; empty without certificates. */ -}}
{{- define "afd.certificate" -}}
{{- $made := ternary (printf "%s-%s-tls" (include "afd.name" .root) .role) "" (ne (include "afd.issuer" .) "") -}}
{{ get .root.Values.tls.secrets .role | default $made }}
{{- end -}}

{{- /* Who makes the certificate of a role, or the public one, as JSON; empty where a Secret is given. */ -}}
{{- define "afd.issuer" -}}
{{- $tls := .root.Values.tls -}}
{{- $issuer := ternary (default $tls.certManager.issuer $tls.certManager.publicIssuer) $tls.certManager.issuer (eq .role "public") -}}
{{- if and $issuer (not (get $tls.secrets .role)) }}{{ toJson $issuer }}{{ end -}}
{{- end -}}

{{- define "afd.redisSecret" -}}
{{ .Values.redis.external.secret | default (printf "%s-redis" (include "afd.name" .)) }}
{{- end -}}

{{- /* A value of the environment: 8388608 stays 8388608, where Go says 8.388608e+06. */ -}}
{{- define "afd.text" -}}
{{- ternary . (toJson .) (kindIs "string" .) -}}
{{- end -}}

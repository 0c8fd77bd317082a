{{- /*
The pod of a role: (root, role, and for an FFN shard labels; env: the AFD_* that only this role has).
The last word has what the chart decides: values.schema.json lets no settings and no extraEnv name the same.
*/ -}}
{{- define "afd.pod" -}}
{{- $root := .root -}}
{{- $values := get .root.Values .role -}}
{{- $certificate := include "afd.certificate" . -}}
{{- $isCompute := ne .role "gateway" -}}
{{- $gpus := int (dig "gpu" "count" 0 $values) -}}
{{- $nics := int (dig "rdma" "count" 0 $values) -}}
metadata:
  labels:
    {{- include "afd.selector" . | nindent 4 }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $values.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "afd.anyPod" (dict "root" $root "values" $values "user" 10001) | nindent 2 }}
  terminationGracePeriodSeconds: {{ add $root.Values.drainSeconds 15 }}
  {{- if $values.affinity }}
  affinity: {{- toYaml $values.affinity | nindent 4 }}
  {{- else if and $isCompute $root.Values.rail.topologyKey }}
  affinity:
    podAffinity:
      preferredDuringSchedulingIgnoredDuringExecution:
        - weight: 100
          podAffinityTerm:
            topologyKey: {{ $root.Values.rail.topologyKey | quote }}
            labelSelector:
              matchLabels: {{- include "afd.selector" (dict "root" $root "role" (ternary "ffn" "attention" (eq .role "attention"))) | nindent 16 }}
  {{- end }}
  {{- if $root.Values.topologySpread }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{- include "afd.selector" . | nindent 10 }}
  {{- end }}
  containers:
    - name: {{ .role }}
      image: {{ include "afd.image" . }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- include "afd.restricted" . | nindent 8 }}
        {{- if $nics }}
          add: [IPC_LOCK]  # memory that a network card reads is pinned
        {{- end }}
      ports:
        - {name: grpc, containerPort: 50051}
        - {name: health, containerPort: 50050}
        {{- if $isCompute }}
        - {name: metrics, containerPort: 9090}
        {{- else }}
        - {name: http, containerPort: 8000}
        {{- end }}
      env:
        - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: AFD_REPLICA_ID, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: AFD_HOST, value: {{ $root.Values.host | quote }}}
        - {name: AFD_ADVERTISE_HOST, value: $(POD_IP)}
        - {name: AFD_MESH, value: {{ include "afd.mesh" $root | quote }}}
        - {name: AFD_REDIS, valueFrom: {secretKeyRef: {name: {{ include "afd.redisSecret" $root | quote }}, key: {{ $root.Values.redis.external.urlKey | quote }}}}}
        {{- with $root.Values.redis.external.caKey }}
        - {name: AFD_REDIS_CA, value: /etc/afd/redis/ca.crt}
        {{- end }}
        {{- if $certificate }}
        - {name: AFD_TLS, value: /etc/afd/tls}
        {{- else }}
        - {name: AFD_INSECURE, value: "1"}
        {{- end }}
        - {name: AFD_STARTUP_TIMEOUT_S, value: {{ $root.Values.startupSeconds | quote }}}
        - {name: AFD_DRAIN_TIMEOUT_S, value: {{ $root.Values.drainSeconds | quote }}}
        {{- if $isCompute }}
        - {name: AFD_DTYPE, value: {{ $root.Values.model.dtype }}}
        - {name: AFD_DEVICE, value: {{ ternary "cuda" "cpu" (gt $gpus 0) }}}
        {{- end }}
        {{- with .env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        {{- range $name, $value := merge (dict) $values.settings $root.Values.settings }}
        - {name: AFD_{{ upper $name }}, value: {{ include "afd.text" $value | quote }}}
        {{- end }}
        {{- with $root.Values.telemetry.otlpEndpoint }}
        - {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ . | quote }}}
        - {name: OTEL_RESOURCE_ATTRIBUTES, value: {{ printf "service.namespace=%s,k8s.namespace.name=%s" $root.Release.Name $root.Release.Namespace | quote }}}
        {{- end }}
        {{- with $values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      startupProbe:  # as long for the weights as for the parts that it needs
        grpc: {port: 50050, service: ready}
        periodSeconds: 2
        timeoutSeconds: 5
        failureThreshold: {{ $root.Values.startupSeconds }}
      readinessProbe:  # weights loaded, pairs up, one forward passed, not told to stop
        grpc: {port: 50050, service: ready}
        periodSeconds: 5
        timeoutSeconds: 5
      livenessProbe:  # its event loop answers
        grpc: {port: 50050, service: ""}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      {{- if not $isCompute }}
      lifecycle:  # SIGTERM drains; before it, the Services' endpoints have the time to forget this pod
        preStop: {exec: {command: [sleep, "5"]}}
      {{- end }}
      resources:
        {{- with $values.resources.requests }}
        requests: {{- toYaml . | nindent 10 }}
        {{- end }}
        {{- if or $values.resources.limits $gpus $nics }}
        limits:
          {{- with $values.resources.limits }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
          {{- if $gpus }}
          {{ $values.gpu.resource }}: {{ $gpus }}
          {{- end }}
          {{- if $nics }}
          {{ $values.rdma.resource }}: {{ $nics }}
          {{- end }}
        {{- end }}
      volumeMounts:
        - {name: model, mountPath: /model, readOnly: true{{ with $root.Values.model.subPath }}, subPath: {{ . | quote }}{{ end }}}
        - {name: tmp, mountPath: /tmp}
        {{- if $isCompute }}
        - {name: shm, mountPath: /dev/shm}
        {{- end }}
        {{- if $certificate }}
        - {name: tls, mountPath: /etc/afd/tls, readOnly: true}
        {{- if not $isCompute }}
        - {name: public-tls, mountPath: /etc/afd/public-tls, readOnly: true}
        {{- end }}
        {{- end }}
        {{- if $root.Values.redis.external.caKey }}
        - {name: redis-ca, mountPath: /etc/afd/redis, readOnly: true}
        {{- end }}
        {{- with $values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: model
      {{- if $root.Values.model.persistentVolumeClaim }}
      persistentVolumeClaim: {claimName: {{ $root.Values.model.persistentVolumeClaim | quote }}, readOnly: true}
      {{- else }}
      hostPath: {path: {{ $root.Values.model.hostPath | quote }}, type: Directory}
      {{- end }}
    - {name: tmp, emptyDir: {}}
    {{- if $isCompute }}
    - name: shm
      {{- if $root.Values.sharedMemory.hostPath }}
      hostPath: {path: {{ $root.Values.sharedMemory.hostPath | quote }}, type: Directory}
      {{- else }}
      emptyDir: {medium: Memory, sizeLimit: {{ $root.Values.sharedMemory.size }}}
      {{- end }}
    {{- end }}
    {{- if $certificate }}
    - {name: tls, secret: {secretName: {{ $certificate | quote }}, defaultMode: 0440}}
    {{- if not $isCompute }}
    - {name: public-tls, secret: {secretName: {{ include "afd.certificate" (dict "root" $root "role" "public") | quote }}, defaultMode: 0440}}
    {{- end }}
    {{- end }}
    {{- with $root.Values.redis.external }}
    {{- if .caKey }}
    - {name: redis-ca, secret: {secretName: {{ .secret | quote }}, items: [{key: {{ .caKey | quote }}, path: ca.crt}]}}
    {{- end }}
    {{- end }}
    {{- with $values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{- /* What every pod has, whatever is in it: (root, values that say where it may run, and the user that the image knows). */ -}}
{{- define "afd.anyPod" -}}
enableServiceLinks: false  # AFD_FFN_PORT=tcp://... is no setting
automountServiceAccountToken: false
{{- with .root.Values.serviceAccount }}
serviceAccountName: {{ . | quote }}
{{- end }}
securityContext:
  runAsNonRoot: true
  {{- if .root.Values.fixedUsers }}
  runAsUser: {{ .user }}
  runAsGroup: {{ .user }}
  fsGroup: {{ .user }}
  {{- end }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- with dig "runtimeClass" "" .values }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with .values.priorityClass }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /* What every container may do: next to nothing. */ -}}
{{- define "afd.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- /* A pod that the gateway's image does something in, once, where gateways may run: (root, role, command, env, mounts, volumes). */ -}}
{{- define "afd.task" -}}
{{- include "afd.anyPod" (dict "root" .root "values" .root.Values.gateway "user" 10001) }}
restartPolicy: Never
containers:
  - name: {{ .role }}
    image: {{ include "afd.image" (dict "root" .root "role" "gateway") }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    command: {{ toJson .command }}
    terminationMessagePolicy: FallbackToLogsOnError
    securityContext: {{- include "afd.restricted" . | nindent 6 }}
    {{- with .env }}
    env: {{- toYaml . | nindent 6 }}
    {{- end }}
    resources: {requests: {cpu: 100m, memory: 128Mi}, limits: {memory: 256Mi}}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      {{- with .mounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
volumes:
  - {name: tmp, emptyDir: {}}
  {{- with .volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- /* The names of a role's pods, also of those that are not ready: who is asked is in the registry. (root, role, port, number) */ -}}
{{- define "afd.headlessService" -}}
apiVersion: v1
kind: Service
metadata: {{- include "afd.metadata" . | nindent 2 }}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector: {{- include "afd.selector" . | nindent 4 }}
  ports:
    - {name: {{ .port }}, port: {{ .number }}, targetPort: {{ .port }}}
{{- end -}}

// Shows an answer token by token, from JavaScript: gRPC and the .proto files are all it takes (npm install).

import grpc from '@grpc/grpc-js'
import { loadSync } from '@grpc/proto-loader'

const [target = 'localhost:50051'] = process.argv.slice(2)

const protos = new URL('../../protos', import.meta.url).pathname
const definition = loadSync('afd/v1/gateway.proto', { includeDirs: [protos], defaults: true })
const { afd } = grpc.loadPackageDefinition(definition)
const gateway = new afd.v1.GatewayService(target, grpc.credentials.createInsecure())

const messages = [{ role: 'user', content: 'Which day comes 7 days after Monday?' }]
const call = gateway.Generate({ chat: { messages }, sampling: { maxTokens: 64 } }, { deadline: Date.now() + 30_000 })

try {
  for await (const { tokens } of call) {
    for (const { text } of tokens) process.stdout.write(text)
  }
  process.stdout.write('\n')
} catch (error) {
  console.error(error.message)
  process.exitCode = 1
}

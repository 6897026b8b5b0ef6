// A relay of js-libp2p on a host of a lab; says its multiaddr.  In a folder with its packages:
//     node --input-type=module - IP4 < js_relay.mjs

// Node 20 lacks it; libp2p is imported only then
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new Promise((...both) => { [resolve, reject] = both })
  return { promise, resolve, reject }
}
const { createLibp2p } = await import('libp2p')
const { tcp } = await import('@libp2p/tcp')
const { noise } = await import('@chainsafe/libp2p-noise')
const { yamux } = await import('@chainsafe/libp2p-yamux')
const { identify } = await import('@libp2p/identify')
const { circuitRelayServer } = await import('@libp2p/circuit-relay-v2')

const relay = await createLibp2p({
  addresses: { listen: [`/ip4/${process.argv[2]}/tcp/4001`] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: {
    identify: identify(),
    relay: circuitRelayServer({ reservations: { applyDefaultLimit: false } })
  }
})
console.log(JSON.stringify(relay.getMultiaddrs()[0].toString()))

// A client in Node: node client.js ADDRESS USER_ID
//
// Creates a segment, rolls it out, reads a user, deletes it, and shows an error's reason. Nothing is generated: the
// files of build/client-protos are read at start. User ids go beyond what a JavaScript number holds, so they are strings.

import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { promisify } from "node:util";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import protobuf from "protobufjs";

const PROTOS = process.env.CLIENT_PROTOS ?? "build/client-protos";
const READ_DEADLINE_MS = 500; // what a login may wait
const CHANGE_DEADLINE_MS = 60_000;

const files = ["membership", "segments", "operations"].map((name) => `segmentation/v1/${name}.proto`);
const answers = ["google/rpc/status.proto", "google/rpc/error_details.proto"];
const options = { includeDirs: [PROTOS], longs: String, enums: String, defaults: true, oneofs: true };
const { segmentation } = grpc.loadPackageDefinition(loader.loadSync(files, options));

const details = new protobuf.Root();
details.resolvePath = (_, target) => join(PROTOS, target);
details.loadSync(answers);
const Status = details.lookupType("google.rpc.Status");
const ErrorInfo = details.lookupType("google.rpc.ErrorInfo");

/** The service's stable reason; "" if the error does not come from the service. */
function reasonOf(error) {
  const [bytes] = error.metadata?.get("grpc-status-details-bin") ?? [];
  const found = bytes ? Status.decode(bytes).details : [];
  const info = found.find((detail) => detail.type_url.endsWith("/google.rpc.ErrorInfo"));
  const { domain, reason } = info ? ErrorInfo.decode(info.value) : {};
  return domain === "segsvc" ? reason : "";
}

/** What each call carries: the token, if the service asks for one. */
const metadata = new grpc.Metadata();
if (process.env.SEGSVC_TOKEN) metadata.set("authorization", `Bearer ${process.env.SEGSVC_TOKEN}`);

/** A client whose methods return promises and take a deadline. */
function connect(Service, address) {
  const config = readFileSync(new URL("../service_config.json", import.meta.url), "utf8");
  const client = new Service(address, grpc.credentials.createInsecure(), { "grpc.service_config": config });
  const call = (method, request, deadlineMs) =>
    promisify(client[method].bind(client))(request, metadata, { deadline: Date.now() + deadlineMs });
  return { call, close: () => client.close() };
}

const [address, userId] = process.argv.slice(2);
const memberships = connect(segmentation.v1.MembershipService, address);
const segments = connect(segmentation.v1.SegmentService, address);

async function isMember(slug) {
  try {
    const answer = await memberships.call("getUserSegments", { userId }, READ_DEADLINE_MS);
    return answer.slugs.includes(slug);
  } catch (error) {
    if (reasonOf(error) === "USER_NOT_FOUND") return false;
    throw error;
  }
}

// One request_id for one change: repeated with it, a call changes nothing twice.
const slug = `node-client-${randomUUID().slice(0, 8)}`;
const creation = { segment: { slug, displayName: "Made by a client" }, requestId: randomUUID() };
await segments.call("createSegment", creation, CHANGE_DEADLINE_MS);

// The call waits for the end. An operation that failed is an answer with an error, not an RPC error.
const rollout = { slug, rule: { percent: 100 }, requestId: randomUUID() };
const operation = await segments.call("rollOutSegment", rollout, CHANGE_DEADLINE_MS);
console.log(`${operation.name}: done=${operation.done} error='${operation.error?.message ?? ""}'`);

console.log(`user ${userId} is in ${slug}: ${await isMember(slug)}`);
await segments.call("deleteSegment", { slug, requestId: randomUUID() }, CHANGE_DEADLINE_MS);
console.log(`user ${userId} is in ${slug}: ${await isMember(slug)}`);

try {
  await segments.call("getSegment", { slug }, READ_DEADLINE_MS);
} catch (error) {
  console.log(grpc.status[error.code], reasonOf(error));
}
memberships.close();
segments.close();

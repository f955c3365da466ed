// Types of asena.js: those of the npm package `centrifuge`, as far as they go.

export type State = "disconnected" | "connecting" | "connected";
export type SubscriptionState = "unsubscribed" | "subscribing" | "subscribed";

export interface Options {
  /** Tells the server who this is. */
  token?: string;
  /** Gives a token when there is none, or when it has expired. */
  getToken?: null | ((ctx: { channel?: undefined }) => Promise<string | null>);
  /** What the service gets with the connection. */
  data?: any;
  /** What the service gets as headers, which a browser cannot send. */
  headers?: Record<string, string>;
  /** Of the client, for whoever watches the server. */
  name?: string;
  version?: string;
  /** Milliseconds between attempts to connect, which grow from one to the other. Defaults: 500 and 20000. */
  minReconnectDelay?: number;
  maxReconnectDelay?: number;
  /** Milliseconds for the handshake, and for every answer. Default: 5000. */
  timeout?: number;
  /** Milliseconds that a ping of the server's may be late; 0: any number. Default: 10000. */
  maxServerPingDelay?: number;
  /** A WebSocket, where there is no global one. */
  websocket?: any;
}

export interface StreamPosition {
  offset: number;
  epoch: string;
}

export interface SubscriptionOptions {
  token?: string;
  data?: any;
  /** Where to go on from. */
  since?: StreamPosition;
  positioned?: boolean;
  recoverable?: boolean;
  joinLeave?: boolean;
  /** Milliseconds between attempts to subscribe, which grow from one to the other. Defaults: 500 and 20000. */
  minResubscribeDelay?: number;
  maxResubscribeDelay?: number;
}

/** What calls are rejected with. Codes from 100 on are the server's. */
export interface Error {
  code: number;
  message: string;
  temporary?: boolean;
}

export interface ClientInfo {
  client: string;
  user: string;
  connInfo?: any;
  chanInfo?: any;
}

export interface Reason {
  code: number;
  reason: string;
}

export interface ConnectedContext {
  client: string;
  transport: string;
  data?: any;
}

export interface ErrorContext {
  type: string;
  error: Error;
}

export interface PublicationContext {
  channel: string;
  data: any;
  info?: ClientInfo;
  offset?: number;
  tags?: Record<string, string>;
}

export interface SubscribedContext {
  channel: string;
  recoverable: boolean;
  positioned: boolean;
  streamPosition?: StreamPosition;
  wasRecovering: boolean;
  recovered: boolean;
  data?: any;
}

export interface JoinLeaveContext {
  channel: string;
  info: ClientInfo;
}

export interface ClientEvents {
  connecting: Reason;
  connected: ConnectedContext;
  disconnected: Reason;
  error: ErrorContext;
  message: { data: any };
  // of rooms that the service subscribes this client to
  subscribing: { channel: string };
  subscribed: SubscribedContext;
  unsubscribed: { channel: string };
  publication: PublicationContext;
  join: JoinLeaveContext;
  leave: JoinLeaveContext;
}

export interface SubscriptionEvents {
  subscribing: Reason & { channel: string };
  subscribed: SubscribedContext;
  unsubscribed: Reason & { channel: string };
  publication: PublicationContext;
  join: JoinLeaveContext;
  leave: JoinLeaveContext;
  error: ErrorContext & { channel: string };
}

interface Emitter<Events> {
  on<E extends keyof Events>(event: E, listener: (ctx: Events[E]) => void): this;
  off<E extends keyof Events>(event: E, listener: (ctx: Events[E]) => void): this;
}

/** A room; made by `newSubscription`. */
export interface Subscription extends Emitter<SubscriptionEvents> {
  readonly channel: string;
  readonly state: SubscriptionState;
  subscribe(): void;
  unsubscribe(): void;
  /** Resolves once it is subscribed; rejects when it is unsubscribed, or after `timeout` milliseconds. */
  ready(timeout?: number): Promise<void>;
  publish(data: any): Promise<{}>;
}

export interface Centrifuge extends Emitter<ClientEvents> {}

export class Centrifuge {
  constructor(url: string, options?: Options);
  readonly state: State;
  connect(): void;
  disconnect(): void;
  /** Resolves once it is connected; rejects when it is disconnected, or after `timeout` milliseconds. */
  ready(timeout?: number): Promise<void>;
  rpc(method: string, data: any): Promise<{ data: any }>;
  send(data: any): Promise<void>;
  publish(channel: string, data: any): Promise<{}>;
  newSubscription(channel: string, options?: SubscriptionOptions): Subscription;
  getSubscription(channel: string): Subscription | null;
  removeSubscription(subscription: Subscription): void;
  subscriptions(): Record<string, Subscription>;
}

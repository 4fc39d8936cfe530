CREATE DATABASE shard_3 OWNER segsvc_owner;

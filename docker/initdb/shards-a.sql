CREATE DATABASE shard_2 OWNER segsvc_owner;

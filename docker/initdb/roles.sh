# Run once, when the server's data folder is new and before the files that come after it by name: the logins of the
# services and of the databases' owner. `segsvc migrate --roles` gives the group roles their rights.
psql --set=ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" \
    --set=owner_password="$OWNER_PASSWORD" --set=services_password="$SERVICES_PASSWORD" --set=database="$POSTGRES_DB" <<'SQL'
CREATE ROLE compose_segsvc_change NOLOGIN;
CREATE ROLE compose_segsvc_read NOLOGIN;
CREATE ROLE segsvc LOGIN PASSWORD :'services_password' IN ROLE compose_segsvc_change;
CREATE ROLE segsvc_owner LOGIN PASSWORD :'owner_password';
ALTER DATABASE :"database" OWNER TO segsvc_owner;
SQL
